"""ListOps for TensorFlow Datasets, from the generator of `listops`; nothing is downloaded.

    import spectral_pod.data.tasks.listops_tfds
    train = tfds.load("listops", split="train", data_dir=...)

Importing this module registers the builder. It holds the same examples as a byte store that
`ListOps.build` writes with the same seed and sizes. This module alone imports TensorFlow.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from spectral_pod.data.tasks import listops, listops_expressions


@dataclasses.dataclass
class ListopsConfig(tfds.core.BuilderConfig):
    """The task whose seed and sizes the examples have; its encoding is not used."""

    task: listops.ListOps = listops.ListOps()  # noqa: RUF009 (frozen)


class Listops(tfds.core.GeneratorBasedBuilder):
    """`Source`, the official text with parentheses, and `Target`, the value, 0 to 9."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar[list[ListopsConfig]] = [
        ListopsConfig(name="full", description="The official sizes."),
        ListopsConfig(
            name="tiny",
            description="For tests.",
            task=listops.ListOps(train=24, validation=8, test=8),
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=listops_expressions.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "Source": tfds.features.Text(),
                    "Target": tfds.features.ClassLabel(names=listops_expressions.CLASSES),
                }
            ),
            supervised_keys=("Source", "Target"),
            homepage="https://github.com/google-research/long-range-arena",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        examples = self.builder_config.task.splits()
        return {name: self._generate_examples(split) for name, split in examples.items()}

    def _generate_examples(
        self, examples: Iterable[listops_expressions.Example]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, example in enumerate(examples):
            source = listops_expressions.encode(example.symbols, "raw")
            yield key, {"Source": source, "Target": example.answer}
