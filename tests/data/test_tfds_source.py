"""A TFDS dataset that is built here is read back, from either of its file formats."""

import os
import subprocess
import sys

import numpy as np
import pytest

from spectral_pod.data import tfds_source
from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.tasks import records
from spectral_pod.data.tasks.lm import LanguageModelling
from spectral_pod.data.tasks.records import Records
from spectral_pod.errors import DataError

NUM = {"train": 30, "test": 10}
NAMES = ["cat", "dog", "eel"]
GRADES = ["1", "2", "0"]  # names that are also indices, of other classes


def example(i):
    image = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
    text = f"example {i} é"
    return {"image": image, "text": text, "kind": i % 3, "grade": i % 3, "year": 1900 + i}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """{file format: the folder of datasets}; imports TensorFlow here only, as it takes seconds."""
    import tensorflow_datasets as tfds

    class TinyPets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(4, 4, 3)),
                "text": tfds.features.Text(),
                "kind": tfds.features.ClassLabel(names=NAMES),
                "grade": tfds.features.ClassLabel(names=GRADES),
                "year": np.int64,
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(name) for name in NUM}

        def _generate_examples(self, split):
            start = 100 * (split == "test")
            yield from ((i, example(i)) for i in range(start, start + NUM[split]))

    folders = {}
    for file_format in ("array_record", "tfrecord"):
        folders[file_format] = str(tmp_path_factory.mktemp(file_format))
        TinyPets(data_dir=folders[file_format]).download_and_prepare(file_format=file_format)
    return folders


@pytest.fixture
def use(prepared, monkeypatch):
    import tensorflow_datasets as tfds

    def use_format(file_format):
        monkeypatch.setattr(tfds.core.constants, "DATA_DIR", prepared[file_format])

    return use_format


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_examples_are_rows(use, file_format):
    use(file_format)
    source = "tfds:tiny_pets/train"
    rows = list(tfds_source.rows(source))
    assert [row.place for row in rows] == [f"{source}[{i}]" for i in range(30)]
    years = [row.fields["year"] for row in rows]
    assert sorted(years) == list(range(1900, 1930))
    for row in rows:
        expected = example(row.fields["year"] - 1900)
        np.testing.assert_array_equal(row.fields["image"], expected["image"])
        assert row.fields["image"].dtype == np.uint8
        assert row.fields["text"] == expected["text"].encode()
        assert row.fields["kind"] == NAMES[expected["kind"]].encode()
    again = [row.fields["year"] for row in tfds_source.rows("tfds:tiny_pets:1.0.0/train[:50%]")]
    assert again == years[:15]
    rest = [row.fields["year"] for row in tfds_source.rows("tfds:tiny_pets/train[50%:]+test")]
    assert rest[:15] == years[15:]
    assert sorted(rest[15:]) == list(range(2000, 2010))
    assert tfds_source.class_names(source, "kind") == tuple(NAMES)
    assert tfds_source.class_names(source, "text") == tfds_source.class_names(source, "no") == ()
    assert tfds_source.describe("tfds:tiny_pets/train[:50%]") == {
        "source": "tfds:tiny_pets/train[:50%]",
        "tfds": "tiny_pets/1.0.0",
        "examples": 15,
    }


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_records_of_a_set(use, tmp_path, file_format):
    use(file_format)
    options = {
        "train": "tfds:tiny_pets/train[:20]",
        "validation": "tfds:tiny_pets/train[20:]",
        "test": "tfds:tiny_pets/test",
        "data": "image",
        "label": "kind",
        "luma": True,
    }
    Records(**options).build(str(tmp_path / "store"))
    store = ByteStore(str(tmp_path / "store"))
    assert store.classes == NAMES
    found = {}
    for name, count in {"train": 20, "validation": 10, "test": 10}.items():
        split = store.split(name)
        assert len(split) == count
        found |= {d.tobytes(): int(y) for d, y in zip(split.read(range(count)), split.labels)}
    everything = map(example, [*range(30), *range(100, 110)])
    assert found == {records.to_luma(e["image"]).tobytes(): e["kind"] for e in everything}
    Records(**options | {"label": "grade"}).build(str(tmp_path / "grades"))
    grades = ByteStore(str(tmp_path / "grades"))
    assert grades.classes == GRADES
    labels = [store.split(name).labels.tolist() for name in NUM]
    assert labels == [grades.split(name).labels.tolist() for name in NUM]
    Records(**options).check(store)
    assert store.manifest["provenance"]["sources"]["test"]["tfds"] == "tiny_pets/1.0.0"


def test_array_records_are_read_without_tensorflow(prepared):
    """They are read without the code that wrote them, too."""
    code = (
        "import sys\n"
        "from spectral_pod.data.tasks import records\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "from spectral_pod.data import tfds_source\n"
        "print(len(list(tfds_source.rows('tfds:tiny_pets/test'))), 'tensorflow' in sys.modules)"
    )
    environment = os.environ | {"TFDS_DATA_DIR": prepared["array_record"]}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split() == ["10", "False"], done.stderr


def test_documents_of_a_language_model(use, tmp_path):
    use("array_record")
    options = {"train": "tfds:tiny_pets/train", "validation": "tfds:tiny_pets/test"}
    task = LanguageModelling(**options)
    task.build(str(tmp_path / "store"))
    store = ByteStore(str(tmp_path / "store"))
    for split, years in {"train": range(30), "validation": range(100, 110)}.items():
        documents = [data.tobytes() for data in store.split(split).read(range(len(years)))]
        assert sorted(documents) == sorted(example(i)["text"].encode() for i in years)
    task.check(store)
    assert store.manifest["provenance"]["splits"]["train"]["first"] == "tfds:tiny_pets/train[0]"
    with pytest.raises(DataError, match=r"train\[0\]: no field: 'body'.*options\.data"):
        LanguageModelling(**options, data="body").build(str(tmp_path / "store"))


def test_what_is_not_there_is_named(use, monkeypatch):
    use("array_record")
    import tensorflow_datasets as tfds

    for source, message in {
        "tfds:tiny_pets": "names no split; write tfds:NAME/SPLIT",
        "tfds:tiny_pets/": "names no split",
        "tfds:tiny_pets/dev": r"tiny_pets/1\.0\.0 has no split 'dev'; there are .*test.*slices",
        "tfds:tiny_pets/train[:x]": r"has no split 'train\[:x\]'",
        "tfds:tiny_pats/train": r"not prepared below .*\(.*tiny_pats.*\)\. Check the name",
        "tfds:tiny_pets:9.0.0/train": r"not prepared below .*9\.0\.0",
    }.items():
        with pytest.raises(DataError, match=message) as error:
            list(tfds_source.rows(source))
        assert str(error.value).startswith(source)
        assert len(str(error.value)) < 700

    def fail(self, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(
        DataError,
        match=r"\(ConnectionError: no route to host\).*TFDS_DATA_DIR .*`tfds build mnist`",
    ):
        list(tfds_source.rows("tfds:mnist/train"))
