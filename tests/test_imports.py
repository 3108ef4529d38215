"""The direction of imports: which modules may import which, and what pure modules may not."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "spectral_pod"

# Module prefix -> the modules of this package that it may import. The longest match applies.
_TRAINABLE = (
    "shapes", "fields", "errors", "seeds", "storage", "project_files", "config", "validation",
    "objectives", "ops",
    "layers", "models", "parallel",
)  # fmt: skip
MAY_IMPORT = {
    "shapes": (),
    "errors": (),
    "streams": (),
    "seeds": (),
    "fields": ("errors",),
    "objectives": ("ops",),
    "storage": ("errors", "fields"),
    "project_files": ("errors", "storage"),
    "lease": ("errors", "storage"),
    "ops": ("shapes", "ops", "parallel.sharding"),
    "layers": ("shapes", "errors", "fields", "ops", "layers", "parallel.sharding"),
    "models": ("shapes", "ops", "layers", "models", "parallel.mesh", "parallel.sharding"),
    "config": ("errors", "fields", "layers", "storage"),
    "validation": ("errors", "fields", "storage", "config", "layers", "models", "data.tasks",
                   "parallel.mesh", "train.optim", "train.selection"),
    "parallel": ("shapes", "errors", "parallel"),
    "data": ("shapes", "errors", "fields", "seeds", "objectives", "storage", "project_files",
             "lease", "data"),
    "data.tasks.agent_traces": ("shapes", "errors", "objectives", "storage", "agent.protocol",
                                "agent.traces", "data"),
    "data.tasks.conversation_task": ("agent.protocol", "data"),
    "data.tasks.agent": ("errors", "fields", "agent.calculator", "agent.protocol", "data"),
    "data.tasks.agent_kinds": ("agent.calculator", "data.tasks.conversation_task"),
    "data.tasks.rag": ("errors", "fields", "storage", "agent.passages", "agent.protocol", "data"),
    "generate": ("shapes", "fields", "seeds", "ops", "layers", "models", "generate"),
    "generate.restore": (*_TRAINABLE, "data.tasks", "data.vocabulary", "train.sealed_steps",
                         "train.state"),
    "generate.text": ("errors", "parallel.sharding", "generate"),
    "generate.export": (*_TRAINABLE, "train.sealed_steps", "generate"),
    "generate.model_card": ("config", "data.tasks", "models", "generate"),
    "generate.run_records": ("errors", "storage", "project_files", "config", "data",
                             "train.sources"),
    "generate.hub": ("errors",),
    "agent": ("errors", "fields", "agent"),
    "agent.calculator": (),
    "agent.passages": (),
    "agent.protocol": ("shapes", "errors"),
    "agent.retrieval": ("errors", "fields", "storage", "project_files", "lease", "data", "agent"),
    "agent.confined": (),
    "agent.sandbox": ("errors", "fields", "agent.confined"),
    "agent.loop": ("errors", "fields", "shapes", "agent", "generate"),
    "agent.writer": ("errors", "seeds", "shapes", "agent.protocol", "generate",
                     "parallel.mesh", "parallel.sharding"),
    "agent.traces": ("errors", "project_files", "agent.protocol"),
    "analysis": ("shapes", "errors", "config", "ops", "layers", "models", "analysis"),
    "analysis.analyzer": (*_TRAINABLE, "generate.restore", "analysis"),
    "train": ("shapes", "errors", "fields", "seeds", "storage", "project_files", "objectives",
              "ops", "layers", "models", "parallel", "train"),
    "train.evaluate": ("data.pipeline", "data.windows", "objectives", "parallel.sharding"),
    "train.sources": ("errors", "storage", "config", "data", "objectives", "parallel.runtime"),
    "train.starts": ("config", "data.tasks", "errors", "storage", "project_files", "lease",
                     "layers", "models", "parallel.runtime"),
    "train.start_from": ("errors", "storage", "project_files", "config", "generate.restore",
                         "parallel.runtime", "train"),
    "train.progress": ("errors", "config", "analysis", "objectives", "parallel.runtime", "train"),
    "train.loop": (*_TRAINABLE, "data", "train"),
    "train.trainer": (*_TRAINABLE, "data", "generate", "train"),
    "command_line": ("errors", "fields", "data.tasks"),
    "recipes": ("config",),
    "": ("api", "errors"),
    "api": (*_TRAINABLE, "data.tasks", "generate", "analysis.analyzer"),
    "spectral_trainer": (*_TRAINABLE, "api", "generate.restore", "train.loop", "train.sources"),
    "main": ("command_line", "config", "errors", "storage", "streams", "parallel.backend",
             "parallel.runtime", "train.loop"),
}  # fmt: skip
PURE = ("ops", "layers", "models", "objectives", "train.step", "train.state", "train.optim",
        "train.selection")  # fmt: skip
NOT_IN_PURE = ("absl", "etils", "tensorstore", "orbax", "tensorflow", "grain", "os", "pathlib")


def modules(root):
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imports(path):
    """The absolute names that a module imports; a name imported from a package counts as a module.

    Imports for type checkers only are left out.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, prefixes):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def violations(root):
    found = []
    for module, path in modules(root):
        rules = [prefix for prefix in MAY_IMPORT if within(module, [prefix])]
        allowed = MAY_IMPORT[max(rules, key=len)] if rules else ()
        for name in imports(path):
            inside = name.removeprefix("spectral_pod.")
            if inside != name and not within(inside, allowed):
                found.append(f"{module} imports {inside}")
            if within(module, PURE) and within(name, NOT_IN_PURE):
                found.append(f"{module} imports {name}")
    return found


def test_imports_run_one_way():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ops/fft.py", "from spectral_pod.layers import dense"),
        ("layers/dense.py", "import tensorstore"),
        ("train/step.py", "from absl import logging"),
        ("data/pipeline.py", "from spectral_pod.train import state"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, module, line):
    (tmp_path / module).parent.mkdir()
    (tmp_path / module).write_text(line)
    assert len(violations(tmp_path)) == 1


def test_training_imports_no_tensorflow():
    program = "import sys, spectral_pod.train.loop; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent).returncode == 0
