"""Proteins: which family, location or other class does a sequence have? From your FASTA files.

    launch/local.sh --config=configs/proteins.py --workdir=DIR \\
        --config.data.options.train=train.fasta.gz --config.data.options.test=test.fasta.gz

The letters of a sequence are read as bytes, up to 1,024 of them. A FASTA record has the fields
`id`, the first word of its header, and `description`, the rest of it; every file also has `name`,
its own name without suffixes, and `folder`. Where the class is

- the whole description (the default): `>P12345 kinase`;
- a part of a field: a regular expression whose group is the class, as for DeepLoc's headers
  `>Q9H400 Cell.membrane-M test`

      --config.data.options.label_pattern='^([^ ]+)-[MSU]'

  or for the name of the protein in UniProt's `>sp|P69905|HBA_HUMAN ...`

      --config.data.options.label=id --config.data.options.label_pattern='[|](\\w+)_\\w+$'

- the name of the file, one for each family: `--config.data.options.label=name`, with
  `--config.data.options.train='families/*.fasta'`;
- in a table beside the sequences: join the two first, to CSV with the columns `sequence` and
  `description`, which is read likewise.

Without files for validation and testing a tenth of the sequences each, by a hash of their letters,
is held out. Related sequences are then in several splits, and figures too good: cluster them by
identity first (MMseqs2, CD-HIT), and name a file for each split. Of proteins by location, eleven
files whose sequences are not related closely, it has 75.9% of a held-out tenth (docs/results.md).
`configs/dna.py` is the task for genomes.
"""

from ml_collections import ConfigDict

from spectral_pod.config import Config
from spectral_pod.recipes import learning_rates, long_range, schedule, small_long_range

SIZES = ("cpu", "full")


def get_config(size: str = "cpu") -> Config:
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are {SIZES}")
    c = long_range()
    c.data.task = "records"
    c.data.options = ConfigDict(
        {
            "train": "proteins.fasta",
            "validation": "",
            "test": "",
            "data": "sequence",
            "label": "description",
            "label_pattern": "",
            "on_fault": "stop",
        }
    )
    c.data.seq_len = 1024
    c.data.truncate = True
    schedule(c, total=20_000, every=1_000)
    if size == "cpu":
        small_long_range(c)
        c.train.global_batch_size = 32
        schedule(c, total=1_500, every=300, warmup=100)
        learning_rates(c, 3e-3)
    return c
