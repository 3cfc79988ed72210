"""The peers' own loops for bench_peers.py, each through its package's simulation interface.

A function takes the `Work`, calls work.tick() before the first and after every round, and returns
the final weights by name. Packages are imported inside, so that only the one that runs must exist.
"""

from __future__ import annotations

import functools
import os
import sys
import types

import torch


def pfl(work) -> dict[str, torch.Tensor]:
    """Apple's pfl: FederatedAveraging over a SimulatedBackend, under torchrun too."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    class Algorithm(FederatedAveraging):
        def train_one_user(self, initial_model_state, model, user_dataset, central_context):
            if work.trains:
                return super().train_one_user(
                    initial_model_state, model, user_dataset, central_context
                )
            work.shift(model.variable_map.values(), user_dataset.user_id[0])
            return model.get_model_difference(initial_model_state), Metrics()

    class Ticks(TrainingProcessCallback):
        def on_train_begin(self, *, model):
            work.tick()
            return Metrics()

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            work.tick()
            return False, Metrics()

    def user_data(user):
        order = work.order(*user)
        return Dataset((work.images.images[order], work.images.labels[order]), user_id=user)

    users = ((c, t) for t in range(1, work.rounds + 1) for c in work.clients(t))
    dataset = FederatedDataset(user_data, lambda: next(users))
    module = work.workspace.build_model()
    module.loss = functools.partial(work.loss, module)
    module.metrics = lambda *batch: {"nothing": Weighted(0, 1)}  # round 1 asks for an evaluation
    central = torch.optim.SGD(module.parameters(), lr=1.0)
    model = PyTorchModel(module, work.optimiser, central)
    rounds = NNAlgorithmParams(
        central_num_iterations=work.rounds,
        evaluation_frequency=10**9,
        train_cohort_size=len(work.clients(1)),
        val_cohort_size=None,
    )
    local = NNTrainHyperParams(
        local_num_epochs=1,
        local_learning_rate=work.options.sgd.lr,
        local_batch_size=work.options.local_steps.batch_size,
    )
    backend = SimulatedBackend(dataset, dataset)
    Algorithm().run(
        rounds, backend, model, local, callbacks=[Ticks()], send_metrics_to_platform=False
    )
    return module.state_dict()


def fedlab(work) -> dict[str, torch.Tensor]:
    """FedLab: a StandalonePipeline of SyncServerHandler and SGDSerialClientTrainer."""
    for name in ("torchvision", "torchvision.transforms"):  # its package imports data sets with it
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
    from fedlab.contrib.algorithm.basic_server import SyncServerHandler
    from fedlab.core.standalone import StandalonePipeline

    class Handler(SyncServerHandler):
        def sample_clients(self):
            return work.clients(self.round + 1)

    class Trainer(SGDSerialClientTrainer):
        def local_process(self, payload, id_list):
            for client in id_list:
                self.set_model(payload[0])
                work.local_training(self._model, client, handler.round + 1)
                self.cache.append([self.model_parameters])

    class Pipeline(StandalonePipeline):
        def evaluate(self):
            work.tick()

    model, fraction = work.workspace.build_model(), work.options.participation.fraction
    handler = Handler(model, work.rounds, fraction)
    pipeline = Pipeline(handler, Trainer(model, len(work.shards)))
    work.tick()
    pipeline.main()
    return handler.model.state_dict()


def flower(work) -> dict[str, torch.Tensor]:
    """Flower: FedAvg in its Ray simulation; usual is 1 worker of all threads, best 1 per thread."""
    from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    workers = work.threads if work.best else 1
    share = work.threads // workers
    arguments = f"{work.arguments} --threads {share}"
    task = (arguments, work.best, work.trains)
    model, many = work.workspace.build_model(), len(work.clients(1))
    client_app, server_app, final = ClientApp(), ServerApp(), {}

    @client_app.train()
    def train_client(message, context):
        from peers import flower_train  # in the worker, where the work is kept between messages

        return flower_train(message, task)

    class Strategy(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            if server_round == 1:
                while len(list(grid.get_node_ids())) < many:
                    pass
                work.tick()
            for node, client in zip(grid.get_node_ids(), work.clients(server_round), strict=True):
                config = ConfigRecord({"client": client, "round": server_round})
                content = RecordDict({"arrays": arrays, "config": config})
                yield Message(content=content, message_type="train", dst_node_id=node)

        def aggregate_train(self, server_round, replies):
            result = super().aggregate_train(server_round, replies)
            work.tick()
            return result

    @server_app.main()
    def serve(grid, context):
        start = ArrayRecord(model.state_dict())
        result = Strategy(fraction_evaluate=0.0).start(grid, start, num_rounds=work.rounds)
        final.update(result.arrays.to_torch_state_dict())

    ray = {"num_cpus": work.threads, "include_dashboard": False, "log_to_driver": False}
    resources = {"client_resources": {"num_cpus": share, "num_gpus": 0.0}, "init_args": ray}
    run_simulation(server_app, client_app, num_supernodes=many, backend_config=resources)
    return final


@functools.cache
def flower_work(arguments: str, best: bool, trains: bool):
    """Return a worker's Work and model."""
    from work import Work

    work = Work(arguments, best=best, trains=trains)
    return work, work.workspace.build_model()


def flower_train(message, task: tuple):
    """Answer a message to train: load the weights, take the local steps, send them back."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    assert os.environ.get("MALLOC_TOP_PAD_")
    work, model = flower_work(*task)
    config = message.content["config"]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    work.local_training(model, config["client"], config["round"])
    weight = MetricRecord({"num-examples": work.sizes[config["client"]]})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": weight})
    return Message(content=content, reply_to=message)
