"""What defines a run, and the name of its folder, which says how it differs from the usual."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

FREE = {  # options that may change while a run goes on
    *("name", "runs_dir", "data_dir", "fresh", "device", "threads", "processes"),
    *("cuda_graph", "fused", "eval_every", "eval_test", "eval_batch", "diagnostics"),
    *("tensorboard", "wandb"),
    *("micro_batch", "early_stop"),  # a run that stops is the beginning of one that does not
}
WORDS = (  # how a folder's name writes what differs from the usual, in this order
    "train-{train} {model} {weights} {image_size}px {head}-head K{clients} C{fraction} {mask} "
    "{mask_rule} s{sparsity} t{threshold} R{calibration_rounds} {consensus} keep{keep_tokens} "
    "{aggregate} {server} slr{server_lr} prox{prox} scaffold{scaffold} local-norm{local_norm} "
    "fedir{fedir} fedvc{fedvc} dropout{dropout} stragglers{straggler_fraction} dp{dp_noise} "
    "secure{secure_aggregation} {schedule} B{batch_size} lr{lr} m{momentum} wd{weight_decay}"
).split()
ALWAYS = {"mask_rule", "sparsity"}  # said of every mask that is made
LONGEST = 100  # characters of a name; a word that does not fit is left to the hash


def default_name(
    command: str, stored: dict, defaults: dict, usual: dict, sharding: str | None
) -> tuple[str, str]:
    """Name a run after what it does and how it differs from the usual, then a short hash of that.

    Args:
        stored: the values of all options, by name.
        defaults: the same of a command line without any, before they follow one another; a later
            version's further options then change no hash.
        usual: the same once they have.
        sharding: iid, nc5 or dir0.3; None of a run without clients.

    Returns:
        the name, and the pattern of all names that the run has in any version.
    """
    leading = [command, stored["data"], sharding, f"J{stored['J']}" if "J" in stored else None]
    start = "-".join(filter(None, leading))
    changed = {k: v for k, v in defining(stored).items() if k not in defaults or v != defaults[k]}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    end = f"seed{stored['seed']}-{digest[:6]}"
    words = ""
    for word in WORDS:
        name = word.partition("{")[2].partition("}")[0]
        value = stored.get(name)
        chosen = value is not None and value is not False
        if chosen and (name in ALWAYS or value != usual.get(name)):
            text = "-" + word.format(**{name: as_word(name, value)})
            words += text if len(start + words + text + end) < LONGEST else ""
    return f"{start}{words}-{end}", f"{start}-*{end}"


def as_word(name: str, value: Any) -> str:
    """Return an option's value as part of a folder's name: of a file its own name, of a flag ""."""
    if name in ("weights", "mask"):
        path = Path(value)
        value = path.parent.name if path.name == "mask.pt" and path.parent.name else path.stem
    text = "" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]", "_", text)


def defining(stored: dict) -> dict:
    """Return the options that define an experiment; a constant schedule can be extended."""
    constant = stored.get("schedule", "constant") == "constant"
    free = FREE | ({"rounds", "epochs"} if constant else set())
    return {name: value for name, value in sorted(stored.items()) if name not in free}
