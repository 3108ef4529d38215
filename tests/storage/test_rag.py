"""An index of documents on gs://, on gs://, is the one of the same documents on disk."""

import json
import sys

from tests import trainer


def rag(*arguments):
    return [sys.executable, "-m", "tools.rag", *arguments]


def test_index_and_search(server, bucket, tmp_path):
    texts = {"a.txt": b"The vault is safe. " * 30, "b/c.txt": b"\xff another vault"}
    (tmp_path / "docs/b").mkdir(parents=True)
    for name, data in texts.items():
        bucket.write(f"docs/{name}", data)
        (tmp_path / "docs" / name).write_bytes(data)
    trainer.run(server.used_by(rag("index", f"{bucket.url}/docs", f"--out={bucket.url}/index")))
    trainer.run(rag("index", f"{tmp_path}/docs", f"--out={tmp_path}/index"))
    assert bucket.names("index/") == ["index/index.json", "index/passages.safetensors"]
    passages = (tmp_path / "index/passages.safetensors").read_bytes()
    assert bucket.read("index/passages.safetensors") == passages
    files = json.loads(bucket.read("index/index.json"))["files"]
    assert files == [f"{bucket.url}/docs/a.txt", f"{bucket.url}/docs/b/c.txt"]
    found = trainer.run(
        server.used_by(rag("search", f"--index={bucket.url}/index", "another vault"))
    ).stdout
    there = trainer.run(rag("search", f"--index={tmp_path}/index", "another vault")).stdout
    assert f"{bucket.url}/docs/b/c.txt:0-15" in found
    assert found == there.replace(str(tmp_path), bucket.url)

    bucket.write("docs/b/c.txt", b"\xff another value")
    done = trainer.run(
        server.used_by(rag("search", f"--index={bucket.url}/index", "another vault")), code=2
    )
    assert f"{bucket.url}/docs/b/c.txt has changed since it was indexed" in done.stderr
