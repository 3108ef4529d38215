"""The code that a run is started with: the working tree as it is, not only what is committed."""

import contextlib
import hashlib
import io
import os
import pathlib
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence

from spectral_pod.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = (
    "spectral_pod_environment"  # in the archive; launch/pod/install.sh takes it from there
)
_LARGEST = 100e6  # bytes of an archive; beyond that something is in it by mistake


class Code:
    """An archive of the working tree and of the trainer's environment.

    Attributes:
      revision: identifies both: workers that have it are not installed again.
      changes: the files that differ from the last commit.
    """

    def __init__(self, environment: Sequence[tuple[str, str]], root: pathlib.Path = ROOT):
        """Reads the working tree: all files that git does not ignore.

        Raises:
          ConfigError: this is no git checkout, or holds very large files.
        """
        self._root = root
        if not (root / ".git").exists():
            raise ConfigError(
                f"{root} is not a git checkout; the workers get the code from one: git clone"
            )
        self.changes = self._git("status", "--porcelain").splitlines()
        with tempfile.TemporaryDirectory() as folder:
            index = os.path.join(folder, "index")  # a copy: yours stays as it is
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(root / self._git("rev-parse", "--git-path", "index"), index)
            self._git("add", "--all", index=index)
            tree = self._git("write-tree", index=index)
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in environment]
        self._environment = "".join(lines).encode()
        self.revision = hashlib.sha256(tree.encode() + self._environment).hexdigest()[:40]
        self._check_size(tree)
        # At once: git drops what nothing refers to, and the run may take weeks.
        self._packed = self._pack(tree)

    def _check_size(self, tree: str) -> None:
        sizes = {}
        for line in self._git("ls-tree", "-r", "--long", "-z", tree).split("\0"):
            if line:
                about, _, name = line.partition("\t")
                sizes[name] = int(about.split()[3]) if about.split()[3].isdigit() else 0
        if sum(sizes.values()) > _LARGEST:
            name = max(sizes, key=lambda one: sizes[one])
            raise ConfigError(
                f"the working tree has {sum(sizes.values()) / 1e6:.0f} MB, {name} alone "
                f"{sizes[name] / 1e6:.0f} MB; what the run does not need belongs into .gitignore"
            )

    def _pack(self, tree: str) -> bytes:
        """The files of a tree of git and the environment, as a compressed archive."""
        done = subprocess.run(
            ["git", "archive", "--format=tar", tree], cwd=self._root, capture_output=True
        )
        if done.returncode:
            raise ConfigError(f"git archive in {self._root}: {done.stderr.decode().strip()}")
        packed = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(done.stdout)) as files,
            tarfile.open(fileobj=packed, mode="w:gz") as both,
        ):
            for member in files:
                both.addfile(member, files.extractfile(member) if member.isreg() else None)
            secret = tarfile.TarInfo(ENVIRONMENT)
            secret.size, secret.mode = len(self._environment), 0o600
            both.addfile(secret, io.BytesIO(self._environment))
        return packed.getvalue()

    @contextlib.contextmanager
    def archive(self) -> Iterator[str]:
        """A file with the archive that only you can read, and that is deleted afterwards."""
        with tempfile.NamedTemporaryFile(prefix="spectral_pod-", suffix=".tar.gz") as file:
            file.write(self._packed)
            file.flush()
            yield file.name

    def _git(self, *arguments: str, index: str = "") -> str:
        environment = os.environ | ({"GIT_INDEX_FILE": index} if index else {})
        done = subprocess.run(
            ["git", *arguments], cwd=self._root, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise ConfigError(f"git {arguments[0]} in {self._root}: {done.stderr.strip()}")
        return done.stdout.strip("\n")
