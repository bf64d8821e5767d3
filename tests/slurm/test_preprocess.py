"""Tokenizing over two nodes gives the tokens of one process, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDataset

from tests.integration.conftest import Corpus
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Job, submit

pytestmark = pytest.mark.slurm

SOURCES = sorted(Path(json.__file__).parent.glob("*.py"))


def preprocess(cluster: Cluster, corpus: Corpus, folder: Path, number: int) -> Job:
    arguments = [str(SOURCES[0].parent / "*.py"), str(folder / "tokens" / "train"), str(corpus.tokenizer)]
    output = folder / f"job{number}.out"
    options = ["--nodes=2", "--cpus-per-task=1"]
    return submit(cluster, output, "examples/slurm/preprocess.sbatch", options, arguments, PARTS=3).wait()


def tokens_of(*prefixes: str | Path) -> list[list[int]]:
    return [np.asarray(row).tolist() for prefix in prefixes for row in IndexedDataset(str(prefix))]


def test_parts_hold_all_documents_once(cluster: Cluster, corpus: Corpus, tmp_path: Path) -> None:
    job = preprocess(cluster, corpus, tmp_path, 1)
    assert (job.state, job.exit_status) == ("COMPLETED", 0), job.printed
    prefixes = yaml.safe_load(job.printed.splitlines()[-1])["data.train_data_path"]
    assert [Path(prefix).name for prefix in prefixes] == ["train-00000", "train-00001", "train-00002"]
    assert sorted(tokens_of(*prefixes)) == sorted(tokens_of(corpus.train))

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("*.bin")}
    Path(f"{prefixes[1]}.idx").unlink()
    job = preprocess(cluster, corpus, tmp_path, 2)
    assert job.state == "COMPLETED", job.printed
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("*.bin")}
    assert [path.name for path in after if after[path] != before[path]] == ["train-00001.bin"]
    assert sorted(tokens_of(*prefixes)) == sorted(tokens_of(corpus.train))
