"""Preprocessing: the same bytes for any number of workers, and nothing half-written whatever happens."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from sentencepiece import SentencePieceTrainer

from megatron_crnet.data.corpus_stats import Skipped
from megatron_crnet.data.preprocess import PreprocessResult, preprocess
from megatron_crnet.data.tokenizer import load_tokenizer
from megatron_crnet.data.worker_pool import ordered_map
from megatron_crnet.utils.errors import ConfigError, CrnetError, DataError
from megatron_crnet.utils.files import atomic_files
from megatron_crnet.utils.progress import Progress, ProgressPrinter
from tests.unit.data_helpers import library_texts, read_indexed, train_small_tokenizer, write_jsonl

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines with bad lines between good ones, and text files."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = write_jsonl(folder / "a.jsonl", library_texts(30)).read_bytes().splitlines(keepends=True)
    bad = b'{"text": "\xff"}\n{"text": ""}\nnot JSON\n{}\n'
    (folder / "a.jsonl").write_bytes(bad.join(lines))
    (folder / "b.json.gz").write_bytes(gzip.compress(b"".join(lines[:10])))
    for i, text in enumerate(library_texts(5)):
        (folder / f"c{i}.py").write_text(text)
    return folder


def run(corpus: Path, prefix: Path, model: str, **options: object) -> PreprocessResult:
    return preprocess([corpus], prefix, "sentencepiece", model, **options)  # type: ignore[arg-type]


def test_texts_of_which_the_tokenizer_leaves_nothing_count_for_nothing(tmp_path: Path) -> None:
    SentencePieceTrainer.train(
        sentence_iterator=iter(library_texts(5)), model_prefix=str(tmp_path / "t"), vocab_size=200, minloglevel=2
    )
    (tmp_path / "in").mkdir()
    nothing = "\u200b\u200b"  # of no width, which its rules take for spaces
    lines = write_jsonl(tmp_path / "in" / "a.jsonl", ["text", nothing, "", "more", nothing])
    for name, text in (("b.txt", "text"), ("c.txt", nothing)):
        (tmp_path / "in" / name).write_text(text)
    result = preprocess([tmp_path / "in"], tmp_path / "out", "sentencepiece", str(tmp_path / "t.model"), workers=0)
    assert (result.documents, result.text_bytes) == (3, 12)
    assert result.by_file == {
        (str(lines), "empty"): Skipped(3, 2),
        (str(tmp_path / "in" / "c.txt"), "empty"): Skipped(1, 0),
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_files_hold_every_document_and_its_end(corpus: Path, model: str, tmp_path: Path) -> None:
    result = run(corpus, tmp_path / "out", model, workers=0)
    tokenizer = load_tokenizer("sentencepiece", model)
    texts = library_texts(30) + library_texts(30)[:10] + library_texts(5)
    data = IndexedDataset(str(tmp_path / "out"))
    assert data.index.dtype == np.uint16
    assert read_indexed(tmp_path / "out") == [[*tokenizer.tokenize(text), tokenizer.eod] for text in texts]
    assert data.document_indices.tolist() == list(range(len(texts) + 1))
    assert (result.documents, result.tokens) == (len(texts), int(data.sequence_lengths.sum()))
    assert result.text_bytes == sum(len(text.encode()) for text in texts)
    assert [result.count(kind) for kind in ("empty", "invalid_utf8", "invalid_json", "missing_text")] == [29] * 4
    assert result.skipped == 4 * 29


def test_the_number_of_workers_and_the_chunks_do_not_change_the_bytes(corpus: Path, model: str, tmp_path: Path) -> None:
    counts = []
    for workers, chunk_bytes in ((0, 1 << 18), (1, 20_000), (2, 3_000)):
        result = run(corpus, tmp_path / f"out{workers}", model, workers=workers, chunk_bytes=chunk_bytes)
        counts.append((result.documents, result.tokens, result.text_bytes, result.skipped))
    assert counts[0] == counts[1] == counts[2]
    for suffix in ("bin", "idx"):
        contents = {(tmp_path / f"out{workers}.{suffix}").read_bytes() for workers in range(3)}
        assert len(contents) == 1
    assert names(tmp_path) == [f"out{i}.{suffix}" for i in range(3) for suffix in ("bin", "fingerprint.json", "idx")]


def test_documents_can_go_without_their_end(model: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    run(path, tmp_path / "out", model, workers=0, append_eod=False)
    tokenizer = load_tokenizer("sentencepiece", model)
    assert read_indexed(tmp_path / "out") == [tokenizer.tokenize("one"), tokenizer.tokenize("two")]


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_names_the_line_and_writes_nothing(corpus: Path, model: str, tmp_path: Path, workers: int) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:2 is not valid UTF-8"):
        run(corpus, tmp_path / "out", model, workers=workers, strict=True)
    assert names(tmp_path) == []


def test_a_corpus_without_a_document_is_refused(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"body": "x"}\n')
    with pytest.raises(DataError, match=r"no document \(1 empty, 1 without the text key\)"):
        run(tmp_path / "a.jsonl", tmp_path / "out", model, workers=0)
    assert names(tmp_path) == ["a.jsonl"]


def test_existing_output_is_kept_unless_asked(model: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "out.bin").write_text("mine")
    with pytest.raises(DataError, match=r"out\.bin exists already"):
        run(path, tmp_path / "out", model, workers=0)
    assert (tmp_path / "out.bin").read_text() == "mine"
    run(path, tmp_path / "out", model, workers=0, overwrite=True)
    assert len(read_indexed(tmp_path / "out")) == 1


def test_errors_that_cost_no_work(model: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(ConfigError, match="workers is -1"):
        run(path, tmp_path / "out", model, workers=-1)
    with pytest.raises(DataError, match="neither a file nor a folder"):
        run(tmp_path / "nowhere", tmp_path / "out", model, workers=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        run(path, tmp_path / "file" / "out", model, workers=0)


def children() -> set[psutil.Process]:
    """Child processes; other tests in this process may have left some, which may end at any moment."""
    return set(psutil.Process().children())


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_leaves_nothing(corpus: Path, model: str, tmp_path: Path, workers: int) -> None:
    def terminate(progress: Progress) -> None:
        if progress.documents:
            os.kill(os.getpid(), signal.SIGTERM)

    before = children()
    with pytest.raises(SystemExit) as caught:
        run(corpus, tmp_path / "out", model, workers=workers, chunk_bytes=3_000, progress=terminate)
    assert caught.value.code == 143
    assert names(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert children() <= before


def test_a_killed_run_leaves_no_output_and_does_not_disturb_the_next(corpus: Path, model: str, tmp_path: Path) -> None:
    def die(progress: Progress) -> None:
        if progress.documents:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        run(corpus, tmp_path / "out", model, workers=0, chunk_bytes=3_000, progress=die)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.glob("out.bin.tmp-*")
    assert names(tmp_path) == [left.name, "out.idx.lock"]
    run(corpus, tmp_path / "out", model, workers=0)
    assert names(tmp_path) == ["out.bin", left.name, "out.fingerprint.json", "out.idx"]


def test_a_stop_between_the_two_renames_never_pairs_old_and_new(tmp_path: Path) -> None:
    data, index = tmp_path / "out.bin", tmp_path / "out.idx"
    data.write_text("old")
    index.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_files(data, index, overwrite=True) as temporaries:
        temporaries[0].write_text("new")  # the second is not written: its rename fails
    assert data.read_text() == "new"
    assert names(tmp_path) == ["out.bin"]


def test_a_worker_that_is_killed_is_an_error(corpus: Path, model: str, tmp_path: Path) -> None:
    before = children()

    def kill_a_worker(_: Progress) -> None:
        for child in list(children() - before)[:1]:  # none is left when both have been killed
            with suppress(psutil.NoSuchProcess):  # one that has been, and was waited for since it was listed
                child.kill()

    with pytest.raises(CrnetError, match=r"worker process \d+ ended with exit code -9"):
        run(corpus, tmp_path / "out", model, workers=2, chunk_bytes=3_000, progress=kill_a_worker)
    assert names(tmp_path) == []
    assert children() <= before


def worker_task(mode: str, job: int) -> tuple[int, int]:
    """Returns the job and the process, or ends badly on job 3."""
    if job == 3 and mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == 3 and mode == "raise":
        raise ZeroDivisionError("job 3")
    time.sleep(0.001)
    return job, os.getpid()


def test_pool_keeps_the_order_and_uses_every_worker() -> None:
    with ordered_map(2, range(200), partial(worker_task, "work")) as found:
        results = list(found)
    assert [job for job, _ in results] == list(range(200))
    assert len({process for _, process in results}) == 2


@pytest.mark.parametrize(
    ("mode", "kind", "message"), [("die", CrnetError, "exit code -9"), ("raise", RuntimeError, "ZeroDivisionError")]
)
def test_pool_reports_a_bad_end(mode: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message), ordered_map(2, range(10), partial(worker_task, mode)) as found:
        list(found)


def test_workers_end_with_a_killed_parent() -> None:
    program = (
        "import multiprocessing, time; from megatron_crnet.data.worker_pool import ordered_map\n"
        "with ordered_map(2, [], abs):\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
        assert psutil.wait_procs(workers, timeout=60)[1] == []


def test_progress_reaches_the_end(corpus: Path, model: str, tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = run(corpus, tmp_path / "out", model, workers=2, chunk_bytes=3_000, progress=seen.append)
    assert len(seen) > 10
    assert [p.documents for p in seen] == sorted(p.documents for p in seen)
    assert seen[-1].documents == result.documents
    assert seen[-1].input_bytes == seen[-1].total_input_bytes == sum(p.stat().st_size for p in corpus.iterdir())


PART = Progress(
    documents=50, text_bytes=2_000_000, tokens=9000, input_bytes=1, total_input_bytes=4, files=3, seconds=100.0
)


@pytest.mark.fault("M11")
def test_progress_prints_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressPrinter(interval=0.0) as show:
        show(PART)
    assert capsys.readouterr().err.splitlines() == [
        "reading 3 files, 0.0 MB",
        "25.0% read, 50 documents, 9,000 tokens, 0 documents/s, 0.02 MB/s, about 5 min 0 s and 27,000 tokens to go",
    ]


@pytest.mark.fault("M11")
def test_progress_estimates_the_rest_where_the_size_is_known() -> None:
    assert replace(PART, input_bytes=4).line() == "100.0% read, 50 documents, 9,000 tokens, 0 documents/s, 0.02 MB/s"
    unknown = replace(PART, total_input_bytes=None, input_bytes=3_000_000).line()
    assert unknown == "3 MB read, 50 documents, 9,000 tokens, 0 documents/s, 0.02 MB/s"
    assert replace(PART, total_input_bytes=10**9).line().endswith("MB/s"), "too little for an estimate"


def test_preprocess_works_outside_the_main_thread(model: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    thread = threading.Thread(target=run, args=(path, tmp_path / "out", model), kwargs={"workers": 1})
    thread.start()
    thread.join()
    assert (tmp_path / "out.idx").exists()


def test_tool_reports_errors_in_one_line_with_status_2(model: str, tmp_path: Path) -> None:
    command = [str(TOOL), "nowhere", "--output", str(tmp_path / "out"), "--tokenizer-model", model]
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=False, timeout=300
    )
    imports = [line for line in ended.stderr.splitlines() if line.startswith("import time:")]
    (error,) = [line for line in ended.stderr.splitlines() if line not in imports]
    assert (ended.returncode, ended.stdout) == (2, "")
    assert error.startswith("error: nowhere is neither a file nor a folder")
    assert any(line.endswith(" megatron_crnet.data.preprocess") for line in imports)
    slow = [line for line in imports if line.split()[-1].partition(".")[0] in ("torch", "megatron")]
    assert not slow, "an error that costs no work must not wait for Megatron-Core's import"
