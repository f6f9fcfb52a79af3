"""Lightning's Trainer: saved on 2 ranks, resumed in new processes on 2 and 1."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import shardckpt
from shardckpt.errors import ShardckptError, StateError
from tests.integrations.jobs import job
from tests.ranks import PRELOAD, like_torchrun, run_ranks

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.plugins.environments import LightningEnvironment  # noqa: E402

from shardckpt.integrations import lightning  # noqa: E402
from shardckpt.integrations.lightning import ShardckptCallback, ShardckptStrategy  # noqa: E402

PRELOAD += ["shardckpt.integrations.lightning", "lightning.pytorch"]
JOB = Path(__file__).parent / "lightning_job.py"
pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]
KINDS = ["ddp", "model_parallel", "callback"]  # torch refuses FSDP1 on CPU ranks


def resume_from(kind: str) -> str:
    return "-" if kind == "callback" else "last"  # the callback finds its checkpoint by itself


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The results of four epochs on 2 ranks, by strategy."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {kind: job(JOB, kind, folder / kind, 4, "-", ranks=2) for kind in KINDS}


@pytest.mark.parametrize("options", [(), ("asynchronous",)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_on_as_many_ranks_is_equal(tmp_path, uninterrupted, kind, options):
    folder = tmp_path / "run"
    first = job(JOB, kind, folder, 2, "-", *options, ranks=2)
    assert first["losses"] == uninterrupted[kind]["losses"][:2]
    second = job(JOB, kind, folder, 4, resume_from(kind), *options, ranks=2)
    assert second["losses"] == uninterrupted[kind]["losses"][2:]
    assert second["digest"] == uninterrupted[kind]["digest"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_on_one_rank_is_equal_but_for_the_order_of_sums(
    tmp_path, uninterrupted, kind
):
    folder = tmp_path / "run"
    job(JOB, kind, folder, 2, "-", ranks=2)
    second = job(JOB, kind, folder, 4, resume_from(kind), ranks=1)
    assert second["losses"] == pytest.approx(uninterrupted[kind]["losses"][2:], rel=1e-3)
    assert second["sum"] == pytest.approx(uninterrupted[kind]["sum"], rel=1e-3)


@pytest.mark.parametrize("options", [(), ("asynchronous",)])
def test_model_checkpoint_keeps_what_it_says(tmp_path, options):
    job(JOB, "ddp", tmp_path / "run", 4, "-", "keep", *options, ranks=2)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["epoch=3.ckpt", "last.ckpt"]
    assert shardckpt.metadata(tmp_path / "run" / "last.ckpt").world_size == 2
    shardckpt.verify(tmp_path / "run" / "epoch=3.ckpt")


def test_a_checkpoint_of_lightning_itself_is_resumed_and_the_next_one_is_ours(
    tmp_path, uninterrupted
):
    folder = tmp_path / "run"
    job(JOB, "lightning", folder, 2, "-", ranks=2)
    assert (folder / "last.ckpt").is_file()
    second = job(JOB, "ddp", tmp_path / "new", 4, folder / "last.ckpt", ranks=2)
    assert second["digest"] == uninterrupted["ddp"]["digest"]
    assert shardckpt.metadata(tmp_path / "new" / "last.ckpt").world_size == 2


def test_the_weights_are_loaded_without_lightning(tmp_path):
    job(JOB, "model_parallel", tmp_path / "run", 2, "-", ranks=2)
    state = shardckpt.load_state(tmp_path / "run" / "last.ckpt")
    assert state["state_dict"]["layers.0.weight"].shape == (16, 8)
    assert state["lightning"]["epoch"] == 1


def test_a_converted_checkpoint_is_resumed_by_lightning_itself(tmp_path, uninterrupted):
    job(JOB, "ddp", tmp_path / "run", 2, "-", ranks=2)
    shardckpt.convert(tmp_path / "run" / "last.ckpt", tmp_path / "file.ckpt", to="lightning")
    second = job(JOB, "lightning", tmp_path / "new", 4, tmp_path / "file.ckpt", ranks=2)
    assert second["digest"] == uninterrupted["ddp"]["digest"]


class Net(pl.LightningModule):
    """Four steps in each epoch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        self.data = torch.randn(16, 4)

    def training_step(self, batch, index):
        return self.layers(batch).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def fitted(epochs, checkpoint=None, *, net=None, callbacks=(), **options):
    """A Trainer of one CPU rank after a number of epochs, and its module."""
    net = net or Net()
    models = any(isinstance(each, pl.callbacks.ModelCheckpoint) for each in callbacks)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_checkpointing=models, enable_model_summary=False, callbacks=list(callbacks),
        plugins=[LightningEnvironment()],  # without it, Lightning starts MPI in this process
        **options,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(net.data, batch_size=4)
    trainer.fit(net, loader, ckpt_path=checkpoint)
    return trainer, net


PREFIX = {"model": "state_dict.layers"}


def trained_by_a_loop(epochs):
    """The same training without Lightning."""
    net = Net()
    (optimizer,), (scheduler,) = net.configure_optimizers()
    for _ in range(epochs):
        for index, batch in enumerate(net.data.split(4)):
            optimizer.zero_grad()
            net.training_step(batch, index).backward()
            optimizer.step()
        scheduler.step()
    return {"model": net.layers, "optimizer": optimizer, "scheduler": scheduler}


def test_the_trainer_resumes_a_file_of_its_own_that_was_converted_to_ours_and_back(tmp_path):
    trainer, _ = fitted(1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    shardckpt.convert(tmp_path / "a.ckpt", tmp_path / "ours")
    shardckpt.convert(tmp_path / "ours", tmp_path / "b.ckpt", to="lightning")
    resumed, net = fitted(3, tmp_path / "b.ckpt")
    complete, expected = fitted(3)
    assert resumed.global_step == complete.global_step == 12
    assert all(map(torch.equal, net.state_dict().values(), expected.state_dict().values()))


def as_lightning(state, folder):
    """Write the state of a loop as the file b.ckpt of Lightning."""
    shardckpt.save(state, folder / "ours")
    names = {"model": "state_dict.layers"}
    shardckpt.convert(folder / "ours", folder / "b.ckpt", to="lightning", rename=names)


def test_the_trainer_resumes_what_a_loop_without_lightning_saved(tmp_path):
    state = trained_by_a_loop(2) | {"step": 8, "epoch": 2}
    as_lightning(state, tmp_path)
    trainer, net = fitted(3, tmp_path / "b.ckpt")
    assert (trainer.global_step, trainer.current_epoch) == (12, 3)
    expected = trained_by_a_loop(3)
    found = net.layers.state_dict()
    assert all(torch.equal(found[name], x) for name, x in expected["model"].state_dict().items())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**3)


def test_the_trainer_resumes_without_a_scheduler(tmp_path):
    state = trained_by_a_loop(1)
    del state["scheduler"]
    as_lightning(state, tmp_path)
    trainer, _ = fitted(1, tmp_path / "b.ckpt")
    assert trainer.global_step == 4


class Part(Net):
    """A module whose hooks keep a frozen layer out of its checkpoints, and put it back."""

    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.strict_loading = False

    def training_step(self, batch, index):
        return super().training_step(self.frozen(batch), index)

    def on_save_checkpoint(self, checkpoint):
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: x for n, x in weights.items() if "frozen" not in n}

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {
            **checkpoint["state_dict"],
            "frozen.bias": torch.full((4,), 2.0),
        }


class Saver(pl.Callback):
    """Saves at the end of an epoch."""

    epoch = 0

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def fitted_by_ours(net, epochs, *callbacks, checkpoint=None, ranks=1, strategy=None):
    """The module after a number of epochs on CPU ranks, by default with a strategy of shardckpt."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, max_epochs=epochs, logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=list(callbacks), strategy=strategy or ShardckptStrategy(),
        plugins=[LightningEnvironment()] if ranks == 1 else [],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(net.data, batch_size=4)
    trainer.fit(net, loader, ckpt_path=checkpoint)
    return net


def resumed_by_hooks(path):
    fitted_by_ours(Part(), 1, Saver(path / "a"))
    assert "state_dict.frozen.bias" not in shardckpt.metadata(path / "a").tensors
    net = fitted_by_ours(Part(), 1, checkpoint=path / "a")
    assert net.frozen.bias.tolist() == [2.0] * 4


def resumed_with_averages(path):
    def average():
        return pl.callbacks.EMAWeightAveraging(decay=0.5)

    expected = fitted_by_ours(Net(), 2, average(), Saver(path / "a"))
    net = fitted_by_ours(Net(), 2, average(), checkpoint=path / "a")
    assert all(map(torch.equal, net.state_dict().values(), expected.state_dict().values()))


@pytest.mark.parametrize("resumed", [resumed_by_hooks, resumed_with_averages])
def test_hooks_that_change_the_weights_of_a_checkpoint_are_honoured(tmp_path, resumed):
    run_ranks(1, alone, resumed, tmp_path)


class LateSaver(pl.Callback):
    """Saves when the strategy has taken DDP off the module."""

    def __init__(self, path):
        self.path = path

    def on_fit_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def normalized(path, kind):
    """Save a batch norm, whose statistics differ between ranks, and return those of this rank."""
    like_torchrun(2)
    net = Net()
    callbacks = {
        "module": [Saver(path / "step-4")],
        "after fit": [LateSaver(path / "step-4")],
        "averages": [Saver(path / "step-4"), pl.callbacks.EMAWeightAveraging(decay=0.5)],
        "callback": [ShardckptCallback(path)],
    }[kind]
    fitted_by_ours(net, 1, *callbacks, ranks=2, strategy="ddp" if kind == "callback" else None)
    return net.layers[1].running_mean.tolist()


@pytest.mark.parametrize("kind", ["module", "after fit", "averages", "callback"])
def test_batch_norms_whose_statistics_differ_between_ranks_are_saved(tmp_path, kind):
    first, second = run_ranks(2, normalized, tmp_path, kind)
    assert first != second
    (folder,) = tmp_path.iterdir()
    saved = shardckpt.load_state(folder)["state_dict"]["layers.1.running_mean"].tolist()
    assert saved != second
    if kind != "averages":
        assert saved == first


def alone(resumed, path):
    like_torchrun(1)
    resumed(path)


@pytest.fixture
def strategy(monkeypatch):
    """A strategy without a Trainer, as in a running fit, which saves any dict in the background."""
    strategy = ShardckptStrategy(asynchronous=True)
    monkeypatch.setattr(strategy, "broadcast", lambda value: value)
    monkeypatch.setattr(strategy, "_state", lambda checkpoint: checkpoint)
    monkeypatch.setattr(strategy, "_is_set_up", True)
    return strategy


def test_a_checkpoint_saved_anew_is_not_removed_as_obsolete(tmp_path, strategy):
    strategy.save_checkpoint({"step": 1}, tmp_path / "a")
    strategy.save_checkpoint({"step": 2}, tmp_path / "b")
    strategy.remove_checkpoint(tmp_path / "a")
    strategy.save_checkpoint({"step": 3}, tmp_path / "a")
    strategy._settle()
    assert shardckpt.load_state(tmp_path / "a") == {"step": 3}


def test_a_checkpoint_io_is_refused(tmp_path):
    plugin = pl.plugins.io.AsyncCheckpointIO()
    strategy = ShardckptStrategy(checkpoint_io=plugin)
    with pytest.raises(StateError, match="does not use a CheckpointIO") as refused:
        strategy.save_checkpoint({}, tmp_path / "a")
    assert "asynchronous=True" in str(refused.value)


def test_the_callback_does_not_save_before_the_first_step_of_accumulated_gradients(tmp_path):
    callback = ShardckptCallback(tmp_path, every_n_steps=2)
    net = Net()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[callback],
        accumulate_grad_batches=2, plugins=[LightningEnvironment()],
    )  # fmt: skip
    trainer.fit(net, torch.utils.data.DataLoader(net.data, batch_size=4))
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_the_callback_calls_hooks_that_change_the_weights(tmp_path):
    fitted(1, net=Part(), callbacks=[ShardckptCallback(tmp_path)])
    assert "state_dict.frozen.bias" not in shardckpt.metadata(tmp_path / "step-4").tensors
    _, net = fitted(1, net=Part(), callbacks=[ShardckptCallback(tmp_path)])
    assert net.frozen.bias.tolist() == [2.0] * 4


class Data(pl.LightningDataModule):
    """Counts the epochs that were begun."""

    def __init__(self):
        super().__init__()
        self.epochs = 0

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(64.0).view(16, 4) / 64, batch_size=4)

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


class Counting(pl.Callback):
    """Keeps its state by hooks."""

    batches = 0

    def on_train_batch_end(self, trainer, *batch):
        self.batches += 1
        trainer.datamodule.epochs = trainer.current_epoch

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["batches"] = self.batches

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.batches = checkpoint["batches"]


def with_averages(epochs, path):
    """The module, the averages and the best score after a number of epochs with the callback."""
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    counting, data = Counting(), Data()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, plugins=[LightningEnvironment()],
        callbacks=[average, ShardckptCallback(path), counting],
    )  # fmt: skip
    net = Net()
    trainer.fit(net, data)
    return [*net.state_dict().values(), torch.tensor([counting.batches, data.epochs])]


def test_a_run_resumed_by_the_callback_continues_averages_and_the_states_of_hooks(tmp_path):
    expected = with_averages(3, tmp_path / "a")
    with_averages(1, tmp_path / "b")
    assert all(map(torch.equal, with_averages(3, tmp_path / "b"), expected))


class Logged(Net):
    """Logs its loss."""

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.log("loss", loss)
        return loss


def saved_under_one_name(path):
    """Save each step in the background under the name that ModelCheckpoint takes as free."""
    models = pl.callbacks.ModelCheckpoint(
        path, filename="fixed", save_top_k=-1, every_n_train_steps=1, monitor="loss"
    )
    fitted(2, net=Logged(), strategy=ShardckptStrategy(asynchronous=True), callbacks=[models])
    assert "file_exists" not in vars(models)


def test_a_path_whose_save_runs_in_the_background_is_not_free(tmp_path):
    run_ranks(1, alone, saved_under_one_name, tmp_path)
    steps = {path.name: shardckpt.load_state(path)["lightning"]["global_step"]
             for path in tmp_path.iterdir()}  # fmt: skip
    names = ["fixed.ckpt", *(f"fixed-v{number}.ckpt" for number in range(1, 8))]
    assert steps == dict(zip(names, range(1, 9), strict=True))


def test_a_path_that_is_removed_after_a_save_in_the_background_is_free(tmp_path, strategy):
    exists = strategy._counted(lambda path, trainer: path.exists())
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for path in paths[:2]:
        strategy.save_checkpoint({"step": 1}, path)
    strategy.remove_checkpoint(paths[0])
    assert paths[0].exists()
    assert [exists(path, None) for path in paths] == [False, True, False]
    strategy._settle()
    assert not paths[0].exists()


def resumed_from_weights(path):
    models = pl.callbacks.ModelCheckpoint(path, filename="a", save_weights_only=True)
    fitted(1, strategy=ShardckptStrategy(), callbacks=[models])
    with pytest.raises(KeyError, match="contains only the model"):
        fitted(2, path / "a.ckpt", strategy=ShardckptStrategy())


def test_a_training_resumed_from_weights_alone_raises_the_error_of_lightning(tmp_path):
    run_ranks(1, alone, resumed_from_weights, tmp_path)


def test_the_callback_resumes_a_checkpoint_in_its_earlier_layout(tmp_path):
    callback = ShardckptCallback(tmp_path)
    dumped = callback._state

    def state(trainer, pl_module):
        saved = dumped(trainer, pl_module)
        others = saved["lightning"].value
        earlier = {
            "fit_loop": others["loops"]["fit_loop"],
            "schedulers": others["lr_schedulers"],
            "precision": {},
            "callbacks": others["callbacks"],
        }
        return {**saved, "lightning": shardckpt.FromRank0(earlier)}

    callback._state = state
    fitted(1, callbacks=[callback])
    trainer, net = fitted(2, callbacks=[ShardckptCallback(tmp_path)])
    _, expected = fitted(2)
    assert trainer.global_step == 8
    assert all(map(torch.equal, net.state_dict().values(), expected.state_dict().values()))


@pytest.mark.parametrize("change", ["save", "remove"])
def test_the_checkpoint_behind_a_link_stays_when_the_link_is_replaced_or_removed(
    tmp_path, strategy, change
):
    strategy.save_checkpoint({"step": 1}, tmp_path / "step-1")
    last = tmp_path / "last"
    last.symlink_to("step-1")  # as ModelCheckpoint(save_last="link") does
    if change == "save":
        strategy.save_checkpoint({"step": 2}, last)
        strategy._settle()
        assert shardckpt.load_state(last) == {"step": 2}
    else:
        strategy.remove_checkpoint(last)
        strategy._settle()
    assert not last.is_symlink()
    assert shardckpt.load_state(tmp_path / "step-1") == {"step": 1}


def test_a_checkpoint_stays_if_the_save_of_the_next_one_fails(tmp_path, strategy, monkeypatch):
    class Failed:
        def wait_staged(self):
            pass

        def result(self):
            raise OSError("no space left on device")

    strategy.save_checkpoint({"step": 1}, tmp_path / "a")
    strategy._settle()
    monkeypatch.setattr(lightning.api, "async_save", lambda *state, **options: Failed())
    strategy.save_checkpoint({"step": 2}, tmp_path / "b")
    strategy.remove_checkpoint(tmp_path / "a")
    with pytest.raises(OSError, match="no space"):
        strategy._settle()
    strategy._settle()
    assert shardckpt.load_state(tmp_path / "a") == {"step": 1}


def test_weights_may_change_after_the_call_of_a_save_in_the_background(tmp_path, strategy):
    weight = torch.ones(200_000)
    strategy.save_checkpoint({"weight": weight}, tmp_path / "a")
    weight.data.zero_()  # as EMAWeightAveraging does before a validation
    strategy._settle()
    assert shardckpt.load_state(tmp_path / "a")["weight"].min() == 1


def test_a_link_to_a_checkpoint_in_a_new_folder_can_be_placed_before_it_is_complete(
    tmp_path, strategy, monkeypatch
):
    folder = tmp_path / "new"
    monkeypatch.setattr(lightning.api, "async_save", lambda *state, **options: FakeHandle())
    strategy.save_checkpoint({"step": 1}, folder / "a")
    (folder / "last").symlink_to("a")


class FakeHandle:
    """A save in the background."""

    def wait_staged(self):
        pass


@pytest.mark.parametrize("case", ["after fit", "hpc"])
def test_saves_after_fit_and_for_the_queue_of_slurm_are_complete_on_return(
    tmp_path, strategy, monkeypatch, case
):
    monkeypatch.setattr(lightning.api, "async_save", None)
    strategy._is_set_up = case == "hpc"
    path = tmp_path / "hpc_ckpt_1.ckpt" if case == "hpc" else tmp_path / "final"
    strategy.save_checkpoint({"step": 1}, path)
    assert shardckpt.load_state(path) == {"step": 1}


def test_an_interrupted_save_for_the_queue_of_slurm_leaves_no_name_that_lightning_reads(
    tmp_path, strategy, monkeypatch
):
    def interrupted(state, path, **options):
        raise KeyboardInterrupt(path)

    monkeypatch.setattr(lightning.api, "save", interrupted)
    with pytest.raises(KeyboardInterrupt) as saved:
        strategy.save_checkpoint({"step": 1}, tmp_path / "hpc_ckpt_1.ckpt")
    assert "hpc_ckpt_" not in str(saved.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_of_lightning_at_the_path_is_replaced(tmp_path, strategy, sharded):
    path = tmp_path / "last.ckpt"
    if sharded:
        path.mkdir()
        (path / "meta.pt").touch()
    else:
        path.touch()
    strategy.save_checkpoint({"step": 1}, path)
    assert (tmp_path / "last.ckpt.replaced").exists()
    strategy._settle()
    assert shardckpt.load_state(path) == {"step": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_of_lightning_stays_if_the_save_that_replaces_it_fails(
    tmp_path, strategy, monkeypatch
):
    def fail(*state, **options):
        raise OSError("no space left on device")

    (tmp_path / "last.ckpt").touch()
    monkeypatch.setattr(lightning.api, "save", fail)
    strategy.asynchronous = False
    with pytest.raises(OSError, match="no space"):
        strategy.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    strategy._settle()
    assert (tmp_path / "last.ckpt.replaced").exists()


def test_a_checkpoint_that_does_not_exist_can_be_removed(tmp_path, strategy):
    strategy.remove_checkpoint(tmp_path / "on_exception.ckpt")  # as OnExceptionCheckpoint does


def test_modules_among_hyperparameters_are_refused():
    checkpoint = {"state_dict": {}, "hyper_parameters": {"loss": [torch.nn.MSELoss()]}}
    with pytest.raises(StateError, match="would pickle this object") as refused:
        lightning._state_to_save(checkpoint, {}, torch.nn.Linear(1, 1))
    assert refused.value.tensor == "lightning.hyper_parameters.loss.0"
    assert "save_hyperparameters" in str(refused.value)


def test_weights_that_a_hook_has_changed_have_names_without_the_prefix_of_compiled_modules():
    net = Net()
    net.layers = torch.compile(net.layers, backend="eager")
    own = lightning._own_weights(net)
    assert own.keys() == net.state_dict().keys()
    changed = {name: value * 2 for name, value in own.items()}
    saved = lightning._weights_to_save(changed, net, net)
    assert saved.entries.keys() == Net().state_dict().keys()


def test_every_rank_saves_its_part_of_the_sharded_tensors_of_hooks(monkeypatch):
    weight, rank0 = torch.ones(2), shardckpt.FromRank0
    monkeypatch.setattr(lightning, "is_dtensor", lambda value: value is weight)
    others = {"mine": {"pair": [weight, 3]}, "loops": {"epoch": 1}}
    saved = lightning._state_to_save({"state_dict": {}, **others}, {}, torch.nn.Linear(1, 1))
    assert saved["lightning"] == {
        "mine": {"pair": [weight, rank0(3)]},
        "loops": rank0({"epoch": 1}),
    }


def test_options_that_ask_for_a_single_file_are_refused():
    with pytest.raises(StateError, match="not a single file"):
        lightning.ShardckptModelParallelStrategy(save_distributed_checkpoint=False)
    with pytest.raises(StateError, match="not a single file"):
        lightning.ShardckptFSDPStrategy(state_dict_type="full")


def test_weights_that_a_hook_has_replaced_are_loaded_into_sharded_models_too():
    strategy = lightning.ShardckptModelParallelStrategy()
    strategy._lightning_module = net = torch.nn.Linear(2, 2)
    strategy._loaded = lightning._own_weights(net)
    weights = {name: torch.full_like(value, 5) for name, value in strategy._loaded.items()}
    strategy.load_model_state_dict({"state_dict": weights})
    assert net.bias.tolist() == [5, 5]


class Unfreezing(pl.callbacks.BaseFinetuning):
    """Adds a layer to the optimizer in the second epoch."""

    def freeze_before_training(self, module):
        self.freeze(module.layers[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.layers[0], optimizer, lr=0.01)


class Frozen(Net):
    """Gives the optimizer the parameters that are not frozen."""

    def configure_optimizers(self):
        return torch.optim.AdamW(filter(lambda each: each.requires_grad, self.parameters()))


def resumed_with_added_parameters(path):
    saver = Saver(path / "a")
    saver.epoch = 1
    fitted_by_ours(Frozen(), 2, Unfreezing(), saver)
    net = fitted_by_ours(Frozen(), 3, Unfreezing(), checkpoint=path / "a")
    assert len(net.trainer.optimizers[0].param_groups) == 2


def test_a_run_whose_callback_adds_parameters_to_the_optimizer_is_resumed(tmp_path):
    run_ranks(1, alone, resumed_with_added_parameters, tmp_path)


def test_the_callback_saves_the_states_of_callbacks_that_were_passed_after_it(tmp_path):
    class Batches(pl.Callback):
        def __init__(self):
            self.count = 0

        def on_train_batch_end(self, *batch):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

    batches = Batches()
    fitted(1, callbacks=[ShardckptCallback(tmp_path, every_n_steps=2), batches])
    saved = shardckpt.load_state(tmp_path / "step-2")["lightning"]["callbacks"]
    assert saved[batches.state_key] == {"count": 2}


def test_the_callback_and_ckpt_path_do_not_both_resume(tmp_path):
    trainer, _ = fitted(1, callbacks=[ShardckptCallback(tmp_path / "run")])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(StateError, match="two checkpoints to resume from"):
        fitted(2, tmp_path / "a.ckpt", callbacks=[ShardckptCallback(tmp_path / "run")])
    callback = ShardckptCallback(tmp_path / "run", resume=False)
    assert fitted(2, tmp_path / "a.ckpt", callbacks=[callback])[0].global_step == 8


def test_the_callback_replaces_the_corrupted_checkpoint_that_it_did_not_resume(tmp_path):
    fitted(2, callbacks=[ShardckptCallback(tmp_path)])
    (shard,) = (tmp_path / "step-8").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="step-8"):
        trainer, _ = fitted(2, callbacks=[ShardckptCallback(tmp_path)])
    assert trainer.global_step == 8
    shardckpt.verify(tmp_path / "step-8")


class Broken(pl.Callback):
    """Raises at the start of the batch after the third step."""

    def on_train_batch_start(self, trainer, *batch):
        if trainer.global_step == 3:
            raise RuntimeError("no more data")


def test_the_saves_of_the_callback_are_complete_after_an_error(tmp_path):
    callback = ShardckptCallback(tmp_path, every_n_steps=2, asynchronous=True)
    with pytest.raises(RuntimeError, match="no more data"):
        fitted(1, callbacks=[callback, Broken()])
    assert shardckpt.load_state(tmp_path / "step-2")["lightning"]["global_step"] == 2


class Unscheduled(Net):
    """Has no scheduler."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_the_callback_names_another_number_of_schedulers(tmp_path):
    fitted(1, callbacks=[ShardckptCallback(tmp_path)])
    with pytest.raises(StateError, match="another number of schedulers"):
        fitted(2, net=Unscheduled(), callbacks=[ShardckptCallback(tmp_path)])


def test_an_error_of_one_rank_does_not_let_the_callback_wait_for_others(tmp_path, monkeypatch):
    keep = [shardckpt.KeepLast(1)]
    callback = ShardckptCallback(tmp_path, every_n_steps=3, asynchronous=True, keep=keep)
    monkeypatch.setattr(shardckpt.CheckpointManager, "_prune", None)  # a collective call
    with pytest.raises(RuntimeError, match="no more data"):
        fitted(1, callbacks=[callback, Broken()])
    assert shardckpt.load_state(tmp_path / "step-3")["lightning"]["global_step"] == 3


class Configured(Net):
    """Has a hyperparameter."""

    def __init__(self, value):
        super().__init__()
        self.save_hyperparameters({"value": value})


class Removing(Configured):
    """Removes the hyperparameters from its checkpoints."""

    def on_save_checkpoint(self, checkpoint):
        del checkpoint["hyper_parameters"]


def begun(net, *callbacks, strategy=None):
    """Begin a fit: what the strategy does before Lightning's own."""
    state = SimpleNamespace(fn="fit")
    trainer = SimpleNamespace(
        state=state, lightning_module=net, datamodule=None, callbacks=callbacks,
        checkpoint_callbacks=callbacks,
    )  # fmt: skip
    (strategy or ShardckptStrategy()).setup(trainer)


@pytest.mark.parametrize("value", [torch.nn.MSELoss(), len])
def test_hyperparameters_that_cannot_be_saved_are_refused_when_fit_begins(value):
    with pytest.raises(ShardckptError, match=r"hyper_parameters\.value"):
        begun(Configured(value), pl.callbacks.ModelCheckpoint())


@pytest.mark.parametrize(
    "made", [lambda: begun(Configured(len)), lambda: begun(Removing(len), pl.Callback())]
)
def test_hyperparameters_that_no_save_has_are_not_refused(made, monkeypatch):
    set_up = []
    monkeypatch.setattr(pl.strategies.DDPStrategy, "setup", lambda *given: set_up.append(given))
    made()
    assert len(set_up) == 1


def test_a_checkpoint_io_is_refused_when_fit_begins():
    strategy = ShardckptStrategy(checkpoint_io=pl.plugins.io.AsyncCheckpointIO())
    with pytest.raises(StateError, match="does not use a CheckpointIO"):
        begun(Net(), pl.Callback(), strategy=strategy)


def test_the_callback_refuses_hyperparameters_that_cannot_be_saved_when_fit_begins(tmp_path):
    net = Configured(torch.nn.MSELoss())
    with pytest.raises(StateError, match="would pickle this object"):
        fitted(1, net=net, callbacks=[ShardckptCallback(tmp_path)])
    assert net.trainer.global_step == 0


@pytest.mark.parametrize("path", ["hpc_ckpt_1.ckpt", "memory://lightning-queue/hpc_ckpt_1.ckpt"])
def test_a_save_for_the_queue_of_slurm_replaces_a_checkpoint_and_may_have_a_url(
    tmp_path, strategy, path
):
    path = path if "://" in path else tmp_path / path
    for step in (1, 2):
        strategy.save_checkpoint({"step": step}, path)
    assert shardckpt.load_state(path) == {"step": 2}


def test_the_strategy_waits_again_for_a_save_if_the_wait_is_interrupted(tmp_path, strategy):
    class Interrupted:
        results = iter([KeyboardInterrupt(), None])

        def result(self):
            if error := next(self.results):
                raise error

    strategy._handles["a"] = handle = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        strategy._settle()
    strategy._settle()
    assert list(handle.results) == []


def test_the_error_of_a_folder_that_cannot_be_made_is_that_of_the_save(tmp_path, strategy):
    (tmp_path / "file").touch()
    strategy.asynchronous = False
    with pytest.raises(ShardckptError):
        strategy.save_checkpoint({"step": 1}, tmp_path / "file" / "a")
