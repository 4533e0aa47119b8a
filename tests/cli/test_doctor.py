"""`retrofit doctor`: what it finds out about a machine and an artifact, and how it ends."""

import json
import re

import pytest
import torch
from commands import done, run
from tiny_models import build

import retrofit
from retrofit.runtime.backends import interface
from retrofit.runtime.backends.fused import self_test as exact
from retrofit.runtime.backends.hf import exact_products


def test_doctor_where_kernels_cannot_run(base, monkeypatch):
    monkeypatch.setattr(exact, "self_test", None)
    options = ("--base", base, "--dtype", "bfloat16")
    text = done("doctor", *options, TRITON_INTERPRET="0")
    for fact in (torch.__version__, retrofit.__version__, "Hub cache", "our kernels need a CUDA GPU", "hf backend"):
        assert fact in text
    found = json.loads(done("doctor", *options, "--json", TRITON_INTERPRET="0"))
    assert found["environment"]["torch"] == torch.__version__
    cpu = found["environment"]["cpu"]
    assert cpu["cores"] >= cpu["physical_cores"] >= cpu["threads"] == 1  # tests run with one thread
    assert f"1 a step on the CPU; physical cores to use {cpu['physical_cores']}" in text
    assert found["environment"]["HF_HUB_OFFLINE"] == "1"
    assert found["backend"] == "hf"
    assert [level["level"] for level in found["levels"]] == ["off", "invariant", "bucket"]
    assert all((level["seconds"] is not None) == level["holds"] for level in found["levels"])
    cheapest = next((level for level in found["levels"][1:] if level["holds"]), found["levels"][0])
    assert found["exact"] == cheapest["level"] and f"{found['exact']} is kept: " in found["verdict"]
    assert found["holds"] is (True if found["exact"] != "off" else None)
    named = {what for check in found["checks"] for what in check["what"].split(", ")}
    assert {"attention", "decoder", "vocabulary"} <= named


def test_doctor_says_that_a_level_does_not_hold(base, monkeypatch):
    """A library that treats every number of rows in its own way."""
    monkeypatch.setattr(exact_products, "_differing", lambda *_: (exact_products.COUNTS, 1))
    result = run("doctor", "--base", base, "--exact", "invariant", TRITON_INTERPRET="0")
    assert result.exit_code == 3, result.output
    assert "invariant does NOT hold on this machine" in result.stdout
    assert re.search(r"invariant +no\n", result.stdout)
    assert "a row's bits depend on the rows beside it" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--backend", "hf"], 0, "the hf backend was asked for"),
        (["--backend", "fused"], 4, "our kernels need a CUDA GPU"),
        (["--exact", "off"], 0, "our kernels need a CUDA GPU"),
        (["--device", "cuda"], 4, "no CUDA GPU"),
        (["--device", "cuda", "--backend", "hf"], 4, "no CUDA GPU"),
        (["--device", "gpu"], 2, "unknown device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_doctor_ends_with_what_is_missing(base, monkeypatch, options, code, message):
    """Of the base that ships with retrofit, and of a smaller one, which is tested sooner."""
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(exact, "self_test", None)
    smaller = ["--base", base] if options == ["--exact", "off"] else []
    result = run("doctor", *options, *smaller, TRITON_INTERPRET="0")
    assert result.exit_code == code, result.output
    assert ["torch", torch.__version__] in [line.split()[:2] for line in result.stdout.splitlines()]
    assert message in (result.stderr if code else result.stdout)
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
def test_doctor_tests_an_artifact(made, monkeypatch):
    monkeypatch.setattr(interface, "BUCKET_ROWS", 14)
    found = json.loads(done("doctor", made, "--json"))
    assert found["holds"] is True
    assert (found["backend"], found["exact"], found["bucket"]) == ("fused", "bucket", 14)
    shapes = {check["what"]: check["shape"] for check in found["checks"]}
    # Two roles of rank 2 beneath q (32) | k (16) | v (16).
    assert shapes["qkv"] == "[70, 32]"
    assert {"decoder", "attention"} < set(shapes)


DOCTORED = [
    exact.Check("qkv", "[8, 8]", "ours", "1, 5 of 8", True),
    exact.Check("o", "[8, 8]", "library", "1, 5 of 8", True),
    exact.Check("decoder", "2 layers", "library", "a tree", False),
]


@pytest.mark.parametrize(
    ("options", "checks", "code", "verdict"),
    [
        ([], 2, 0, "bucket holds on this machine: every row of a forward of 128 rows keeps its bits"),
        (["--exact", "invariant"], 2, 0, "invariant holds on this machine"),
        (["--exact", "off"], 3, 0, "off: nothing is promised; of 3 checks 1 differ"),
        ([], 3, 3, "bucket does NOT hold on this machine: of 3 checks 1 differ"),
        (["--exact", "invariant"], 3, 3, "invariant does NOT hold"),
    ],
)
@pytest.mark.parametrize("subject", ["artifact", "base alone"])
def test_doctor_says_what_holds(made, base, monkeypatch, options, checks, code, verdict, subject):
    asked = []

    def self_test(backend, drafts):
        asked.append((backend.exact, drafts, backend.weights.layers[0].qkv.up is not None))
        return DOCTORED[:checks]

    monkeypatch.setattr(exact, "self_test", self_test)
    given = [made] if subject == "artifact" else ["--base", base]
    result = run("doctor", *given, *options, TRITON_INTERPRET="1")
    assert result.exit_code == code, result.output
    assert verdict in result.stdout
    assert asked == [(options[-1] if options else "bucket", 4 if given == [made] else 8, given == [made])]
    lines = result.stdout.splitlines()
    cells = re.split(r"  +", next(line for line in lines if line.startswith("qkv")))
    assert cells == ["qkv", "[8, 8]", "ours", "1, 5 of 8", "equal"]
    assert sum(line.endswith("DIFFER") for line in lines) == checks - 2
    assert ("Our kernel stands in for the library's at qkv [8, 8]." in result.stdout) == (not options and code == 0)
    if code:
        assert result.stderr.startswith("Error: decoder 2 layers: ")
    else:
        assert result.stderr == ""


def test_doctor_names_what_our_kernels_cannot_run(tmp_path):
    build("phi3").save_pretrained(tmp_path / "phi")
    options = ["--base", tmp_path / "phi"]
    assert "model type 'phi3' is not one of" in done("doctor", *options, TRITON_INTERPRET="1")
    result = run("doctor", *options, "--backend", "fused", "-q", TRITON_INTERPRET="1")
    assert (result.exit_code, "phi3" in result.stderr) == (1, True)
