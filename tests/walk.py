"""A process for runs to drive, whose every step matters to the last."""

import torch


class Walk:
    """A process whose state depends on every step since the start."""

    def __init__(self):
        self.round, self.value = 0, torch.zeros(3, dtype=torch.float64)

    def advance(self):
        self.round += 1
        self.value = torch.cos(self.value * 3 + self.round)
        return {"round": self.round, "value": self.value[0].item()}

    def state_dict(self):
        return {"round": self.round, "value": self.value}

    def load_state_dict(self, state):
        self.round, self.value = state["round"], state["value"].clone()
