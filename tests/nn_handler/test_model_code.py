"""A model's source in its checkpoint: shown, and run only when trusted."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch

from shardckpt import NNHandler, errors
from shardckpt.nn_handler.model_code import collect_code
from tests.nn_handler.models import Net, same, weights
from tests.ranks import run_script

pytestmark = pytest.mark.ranks

FILES = {
    "mine/__init__.py": "",
    "mine/sizes.py": "WIDTH = 5\n",
    "mine/parts/__init__.py": "from .block import Block\n",
    "mine/parts/block.py": """
        import torch
        from torch import nn
        from ..sizes import WIDTH

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, WIDTH)

            def forward(self, inputs):
                return self.linear(inputs)
        """,
    "mine/model.py": """
        from torch import nn
        from mine.parts import Block

        with open("RAN", "a") as file:
            file.write("x")

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = Block()

            def forward(self, inputs):
                return self.block(inputs)
        """,
}
SAVE = """
import sys
from shardckpt import NNHandler
from mine.model import Model
handler = NNHandler(Model, save_model_code=True)
handler.save(sys.argv[1])
"""


@pytest.fixture
def saved(tmp_path):
    for name, source in FILES.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source).replace("RAN", str(tmp_path / "ran")))
    (tmp_path / "src" / "save.py").write_text(SAVE)
    run_script(tmp_path / "src" / "save.py", [tmp_path / "c"])
    (tmp_path / "ran").unlink()
    return tmp_path


def test_a_package_that_is_gone_lives_in_the_checkpoint(saved):
    with pytest.raises(errors.CheckpointError, match=r"model\.class: mine\.model:Model"):
        NNHandler.load(saved / "c")
    assert not (saved / "ran").exists()  # nothing ran
    loaded = NNHandler.load(saved / "c", trust_code=True)
    assert (saved / "ran").read_text() == "x"
    assert set(loaded.model_code) == {
        "mine", "mine.sizes", "mine.parts", "mine.parts.block", "mine.model"
    }  # fmt: skip
    assert loaded.model_code["mine.sizes"] == "WIDTH = 5\n"
    assert "mine" not in sys.modules
    assert loaded.predict(torch.ones(2, 4)).shape == (2, 5)
    loaded.save(saved / "again")  # goes on under its name, with its code
    again = NNHandler.load(saved / "again", trust_code=True)
    assert same(weights(again), weights(loaded))


def test_code_is_shown_without_being_run(saved):
    with pytest.warns(UserWarning, match="not in the handler: model"):
        shown = NNHandler.load(saved / "c", model_class=torch.nn.Module, strict=False)
    assert "class Model" in shown.model_code["mine.model"]
    assert not (saved / "ran").exists()


def test_of_a_script_the_definitions_alone(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import torch
            from torch import nn
            from shardckpt import NNHandler

            WIDTH = 3

            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.linear = nn.Linear(4, WIDTH)

            print("running")
            NNHandler(Model, save_model_code=True).save({str(tmp_path / "c.pth")!r})
            """
        )
    )
    assert run_script(script) == ["running\n"]
    loaded = NNHandler.load(tmp_path / "c.pth", trust_code=True)
    assert loaded.module.linear.out_features == 3
    assert "running" not in loaded.model_code["__main__"]


def test_no_code_was_saved(tmp_path):
    NNHandler(Net).save(tmp_path / "c")
    assert NNHandler.load(tmp_path / "c").model_code is None
    with pytest.raises(errors.CheckpointError, match="no source"):
        NNHandler.load(tmp_path / "c", trust_code=True)


def test_a_class_without_a_file():
    namespace: dict = {"__name__": "nowhere"}
    exec("import torch\nclass Model(torch.nn.Module): pass", namespace)
    with pytest.raises(errors.StateError, match="source"):
        collect_code(namespace["Model"])
