"""What models learn of ListOps' expressions, and by what their accuracy is reported: the root, the
height of operators.
"""

from typing import Any, ClassVar, Self

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from spectral_pod.data.tasks.listops_expressions import CLOSE, NAMES, OPERATORS, SM
from spectral_pod.objectives import Classification, Count, LabelledPositions


@flax.struct.dataclass
class ByRoot(metrics.Metric):
    """The accuracy of the expressions of each root operator: "accuracy_min", ..., "accuracy_sm"."""

    formats: ClassVar = {f"accuracy_{name}": "" for name in NAMES}
    descriptions: ClassVar = {
        f"accuracy_{name}": f"Accuracy on expressions whose root is {name.upper()}, in [0, 1]"
        for name in NAMES
    }

    right_O: jax.Array  # float32 [4], of the operators in the order of `OPERATORS`
    total_O: jax.Array  # float32 [4]

    @classmethod
    def from_model_output(
        cls, tokens: jax.Array, correct: jax.Array, mask: jax.Array, **_: Any
    ) -> Self:
        # As text the root follows the first bracket: [MIN, [MAX, [MED, [SM differ in the next but
        # one byte. Symbols have no such bracket, and begin with the root.
        is_bracket_BL = tokens == ord("[")
        first_B = jnp.argmax(is_bracket_BL, axis=1)
        place_B = jnp.where(jnp.any(is_bracket_BL, axis=1), first_B + 2, 0)
        root_B = jnp.take_along_axis(tokens, place_B[:, None], axis=1)[:, 0]
        names_2O = jnp.asarray([list(OPERATORS), list(b"IAEM")])
        is_root_BO = jnp.any(root_B[:, None, None] == names_2O[None], axis=1) & mask[:, None]
        is_root_BO = is_root_BO.astype(jnp.float32)
        return cls(jnp.einsum("b,bo->o", correct, is_root_BO), jnp.sum(is_root_BO, axis=0))

    def merge(self, other: Self) -> Self:
        return type(self)(self.right_O + other.right_O, self.total_O + other.total_O)

    def compute(self) -> dict[str, float]:  # type: ignore[override]
        counts = zip(NAMES, np.asarray(self.right_O), np.asarray(self.total_O))
        return {f"accuracy_{name}": float(r / n) for name, r, n in counts if n}


class Answer(Classification):
    """The value of an expression, also by its root operator."""

    evaluation_metrics: ClassVar = Classification.evaluation_metrics | {"by_root": ByRoot}
    formats: ClassVar = Classification.formats | ByRoot.formats
    descriptions: ClassVar = Classification.descriptions | ByRoot.descriptions


def _is_last(mask_BL: jax.Array) -> jax.Array:
    """float32 [B, L]: 1 at the last position of the mask in each row."""
    place_BL = jnp.where(mask_BL, jnp.arange(1, mask_BL.shape[1] + 1)[None], 0)
    is_last_BL = mask_BL & (place_BL == jnp.max(place_BL, axis=1, keepdims=True))
    return is_last_BL.astype(jnp.float32)


@flax.struct.dataclass
class LastAccuracy(metrics.Average):
    """The accuracy at the last valid position of each row: of whole expressions."""

    @classmethod
    def from_model_output(cls, correct: jax.Array, mask: jax.Array, **_: Any) -> Self:
        last_BL = _is_last(mask)
        return cls(total=jnp.sum(correct * last_BL), count=jnp.sum(last_BL))


@flax.struct.dataclass
class ByLastRoot(ByRoot):
    """The same, of the last valid position of each row."""

    @classmethod
    def from_model_output(
        cls, tokens: jax.Array, correct: jax.Array, mask: jax.Array, **_: Any
    ) -> Self:
        last_BL = _is_last(mask)
        correct_B, mask_B = jnp.sum(correct * last_BL, axis=1), jnp.any(mask, axis=1)
        return super().from_model_output(tokens, correct_B, mask_B)


class Answers(LabelledPositions):
    """The values of the expressions of a row, each at its end; "accuracy" is of the last one."""

    for_causal_models = False
    training_metrics: ClassVar = {
        "loss": metrics.Average.from_output("loss"),
        "accuracy": LastAccuracy,
    }
    evaluation_metrics: ClassVar = training_metrics | {"by_root": ByLastRoot, "positions": Count}
    formats: ClassVar = LabelledPositions.formats | ByRoot.formats
    descriptions: ClassVar = (
        LabelledPositions.descriptions
        | {"accuracy": "Accuracy of the last expression of each row, in [0, 1]"}
        | ByRoot.descriptions
    )


def heights(tokens_BL: jax.Array) -> jax.Array:
    """int32 [B, L]: at every `]` the height of the operator that it ends, elsewhere 0.

    The height is 1 where all arguments are digits, and else one more than that of the highest
    operator among them. Expressions are given as symbols.
    """
    is_open_BL = jnp.isin(tokens_BL, jnp.asarray(list(OPERATORS)))
    is_close_BL = tokens_BL == CLOSE
    # An operator and its `]` are two symbols.
    depth_1D = jnp.arange(tokens_BL.shape[1] // 2 + 2)[None]

    def step(carry: Any, at: Any) -> tuple[Any, jax.Array]:
        # Of the operators that are open, the highest argument so far, by their depth.
        highest_BD, depth_B = carry
        is_open_B, is_close_B = at
        depth_B += is_open_B.astype(jnp.int32)
        here_BD = depth_1D == depth_B[:, None]
        highest_BD = jnp.where(here_BD & is_open_B[:, None], 0, highest_BD)
        height_B = jnp.max(jnp.where(here_BD, highest_BD, 0), axis=1) + 1
        height_B = jnp.where(is_close_B, height_B, 0)
        depth_B -= is_close_B.astype(jnp.int32)
        around_BD = depth_1D == depth_B[:, None]
        highest_BD = jnp.where(around_BD, jnp.maximum(highest_BD, height_B[:, None]), highest_BD)
        return (highest_BD, depth_B), height_B

    batch = len(tokens_BL)
    start = jnp.zeros((batch, depth_1D.size), jnp.int32), jnp.zeros(batch, jnp.int32)
    _, heights_LB = jax.lax.scan(step, start, (is_open_BL.T, is_close_BL.T))
    return heights_LB.T


@flax.struct.dataclass
class ByHeight(metrics.Metric):
    """The accuracy of operators by their `heights`: "accuracy_height_1", ..., and that of sums of
    digits alone, "accuracy_flat_sm"."""

    formats: ClassVar = {f"accuracy_height_{h}": "" for h in range(1, 10)} | {
        "accuracy_flat_sm": ""
    }
    descriptions: ClassVar = {
        **{
            f"accuracy_height_{h}": f"Accuracy of operators above {h - 1} others, in [0, 1]"
            for h in range(1, 10)
        },
        "accuracy_flat_sm": "Accuracy of SM of digits alone, in [0, 1]",
    }

    right_K: jax.Array  # float32 [10], of heights 1 to 9, and of flat sums
    total_K: jax.Array  # float32 [10]

    @classmethod
    def from_model_output(
        cls, tokens: jax.Array, correct: jax.Array, mask: jax.Array, **_: Any
    ) -> Self:
        height_BL = heights(tokens)
        # Of an operator with digits alone the last one before its `]` is its own.
        place_BL = jnp.where(
            jnp.isin(tokens, jnp.asarray(list(OPERATORS))), jnp.arange(tokens.shape[1])[None], 0
        )
        operator_BL = jnp.take_along_axis(tokens, jax.lax.cummax(place_BL, axis=1), axis=1)
        is_flat_sm_BL = (height_BL == 1) & (operator_BL == SM)
        kinds_KBL = jnp.stack([height_BL == h for h in range(1, 10)] + [is_flat_sm_BL])
        kinds_KBL = (kinds_KBL & mask[None]).astype(jnp.float32)
        return cls(jnp.einsum("kbl,bl->k", kinds_KBL, correct), jnp.sum(kinds_KBL, axis=(1, 2)))

    def merge(self, other: Self) -> Self:
        return type(self)(self.right_K + other.right_K, self.total_K + other.total_K)

    def compute(self) -> dict[str, float]:  # type: ignore[override]
        counts = zip(self.formats, np.asarray(self.right_K), np.asarray(self.total_K))
        return {name: float(right / n) for name, right, n in counts if n}


class Subtrees(Answers):
    """The value of every operator, at the bracket that ends it. "accuracy" is that of the whole
    expressions, comparable with other objectives; "subtree_accuracy" is of all operators."""

    training_metrics: ClassVar = Answers.training_metrics | {
        "subtree_accuracy": metrics.Average.from_output("correct"),
    }
    evaluation_metrics: ClassVar = (
        Answers.evaluation_metrics | training_metrics | {"by_height": ByHeight}
    )
    formats: ClassVar = Answers.formats | {"subtree_accuracy": "subtrees {:.2%}"} | ByHeight.formats
    descriptions: ClassVar = (
        Answers.descriptions
        | {"subtree_accuracy": "Accuracy of the values of all operators, in [0, 1]"}
        | ByHeight.descriptions
    )


@flax.struct.dataclass
class ClosingAccuracy(metrics.Average):
    """The accuracy at valid closing brackets: of the values of operators."""

    @classmethod
    def from_model_output(
        cls, tokens: jax.Array, correct: jax.Array, mask: jax.Array, **_: Any
    ) -> Self:
        closing_BL = (mask & (tokens == CLOSE)).astype(jnp.float32)
        return cls(total=jnp.sum(correct * closing_BL), count=jnp.sum(closing_BL))


class Arguments(Subtrees):
    """As `Subtrees`, with labels where arguments begin; "label_accuracy" is of all labels."""

    training_metrics: ClassVar = Answers.training_metrics | {
        "label_accuracy": metrics.Average.from_output("correct"),
    }
    evaluation_metrics: ClassVar = (
        Subtrees.evaluation_metrics | training_metrics | {"subtree_accuracy": ClosingAccuracy}
    )
    formats: ClassVar = Subtrees.formats | {"label_accuracy": "labels {:.2%}"}
    descriptions: ClassVar = Subtrees.descriptions | {
        "label_accuracy": "Accuracy of all labels, also of those of arguments, in [0, 1]"
    }
