"""results.json: what it says for whole, failed, damaged and hostile runs."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from report_run_maker import document, finding, make_run, metric, png

from orchestrator.history import row_from_results
from orchestrator.layout import RunLayout
from orchestrator.report import AttemptOutcome, build_results, dump_results, results_schema, verdict_sentence

FOUR_PASS = {"integrity": "pass", "provenance": "pass", "numerics": "pass", "training_dynamics": "pass"}


def check_schema(results: dict) -> dict:
    """Valid as written to the file, not only as built."""
    written = json.loads(dump_results(results))
    jsonschema.Draft202012Validator(results_schema()).validate(written)
    return written


def test_the_published_schema_is_a_schema_and_describes_every_number() -> None:
    schema = results_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    undescribed = []

    def walk(node: object, where: str) -> None:
        if isinstance(node, dict):
            kinds = node.get("type", [])
            kinds = [kinds] if isinstance(kinds, str) else kinds
            if isinstance(kinds, list) and {"number", "integer"} & set(kinds) and not node.get("description"):
                undescribed.append(where)
            for key, value in node.items():
                walk(value, f"{where}/{key}")
        elif isinstance(node, list):
            for index, value in enumerate(node):
                walk(value, f"{where}/{index}")

    walk(schema, "")
    assert undescribed == []


def test_a_dimension_takes_the_strongest_evidence_of_any_job(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "r1",
        {"health": document("health", FOUR_PASS), "reconstruct": document("reconstruct", {"task_evidence": "pass"})},
    )
    results = check_schema(build_results(run))
    assert results["verdict"]["overall"] == "pass"
    assert results["verdict"]["reasons"]["task_evidence"] == "reconstruct says pass."
    assert verdict_sentence(results) == "Usable: all five dimensions pass."


def test_what_nobody_measured_keeps_the_whole_from_passing(tmp_path: Path) -> None:
    results = check_schema(build_results(make_run(tmp_path / "r1", {"health": document("health", FOUR_PASS)})))
    assert results["verdict"]["overall"] == "not_measured"
    assert "task evidence was not measured" in results["verdict"]["sentence"]
    assert results["verdict"]["sentence"].startswith("Not established")


def test_a_job_that_failed_measured_nothing_whatever_its_document_claims(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "r1",
        {"health": document("health", dict.fromkeys([*FOUR_PASS, "task_evidence"], "pass"), findings=[finding()])},
        states={"health": {"state": "failed", "error": "CUDA out of memory"}},
        attempt_state="failed",
        status_over={"cause": "job health failed"},
    )
    results = check_schema(build_results(run))
    assert set(results["verdict"]["dimensions"].values()) == {"not_measured"}
    assert results["verdict"]["sentence"] == "No verdict: nothing was measured. The run failed: job health failed."
    assert "CUDA out of memory" in results["verdict"]["reasons"]["integrity"]
    assert [f["id"] for f in results["findings"]] == ["values.nan"]
    assert results["jobs"]["health"]["counts"] is False


def test_an_attempt_that_did_not_succeed_never_passes_even_if_all_jobs_did(tmp_path: Path) -> None:
    passes = document("health", dict.fromkeys([*FOUR_PASS, "task_evidence"], "pass"))
    for state in ("failed", "cancelled", "running"):
        run = make_run(tmp_path / state, {"health": passes}, attempt_state=state)
        assert check_schema(build_results(run))["verdict"]["overall"] == "not_measured", state


def test_a_lost_attempt_is_said_to_be_lost_and_its_running_job_to_have_no_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r1", {}, states={"health": {"state": "running"}}, attempt_state="running")
    results = check_schema(build_results(run, attempt=AttemptOutcome(2, "lost", "the machine restarted")))
    assert results["attempt"] == {"number": 2, "state": "lost", "cause": "the machine restarted"}
    assert results["jobs"]["health"]["state"] == "unknown"
    assert "The run was lost: the machine restarted." in results["verdict"]["sentence"]


def test_a_job_that_never_started_is_stated_as_not_run(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "r1",
        {"health": document("health", FOUR_PASS)},
        states={"reconstruct": {"state": "pending"}},
        attempt_state="cancelled",
    )
    results = check_schema(build_results(run))
    assert results["jobs"]["reconstruct"]["state"] == "not_run"
    assert "Job reconstruct did not run." in results["verdict"]["reasons"]["task_evidence"]


def test_an_error_finding_fails_its_dimension_although_its_job_claims_a_pass(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r1", {"health": document("health", FOUR_PASS, findings=[finding()])})
    assert check_schema(build_results(run))["verdict"]["dimensions"]["numerics"] == "fail"


def test_a_preflight_error_fails_its_dimension_and_its_silence_passes_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r1", {})
    (run.diagnostics / "status.json").unlink()
    run.preflight.write_text(
        json.dumps({"findings": [finding("integrity.truncated", dimension="integrity", title="The file ends early")]})
    )
    results = check_schema(build_results(run))
    assert results["attempt"]["state"] == "not_started"
    assert results["verdict"]["dimensions"]["integrity"] == "fail"
    assert results["verdict"]["dimensions"]["numerics"] == "not_measured"
    assert results["findings"][0]["job"] == "preflight"


def test_findings_stand_worst_first_and_keep_their_job(tmp_path: Path) -> None:
    mixed = [finding("a.info", "info"), finding("b.error", "error", confidence=0.5), finding("c.warning", "warning")]
    run = make_run(
        tmp_path / "r1",
        {"health": document("health", findings=mixed), "mine": document("mine", findings=[finding("d.error")])},
    )
    results = check_schema(build_results(run))
    assert [(f["id"], f["job"]) for f in results["findings"]] == [
        ("d.error", "mine"),
        ("b.error", "health"),
        ("c.warning", "health"),
        ("a.info", "health"),
    ]


def test_metrics_pictures_and_artifacts_arrive_in_one_flat_form(tmp_path: Path) -> None:
    picture = {"path": "reconstruct/p/a.png", "kind": "image", "title": "A", "sample": 3, "modality": "video"}
    run = make_run(
        tmp_path / "r1",
        {"reconstruct": document("reconstruct", metrics=[metric(), metric("x", None)], pictures=[picture], mine=[1])},
        files={"reconstruct/p/a.png": png()},
    )
    results = check_schema(build_results(run))
    assert [(m["job"], m["id"], m["value"]) for m in results["metrics"]] == [
        ("reconstruct", "fmri.voxelwise_correlation", 0.21),
        ("reconstruct", "x", None),
    ]
    assert results["metrics"][1]["reason"] == "no samples"
    assert results["pictures"][0]["role"] is None
    assert {a["path"] for a in results["artifacts"]} == {"reconstruct/reconstruct.json", "reconstruct/p/a.png"}
    assert results["jobs"]["reconstruct"]["numbers"] == {"mine": [1]}


@pytest.mark.parametrize(
    "name", ["plan.json", "provenance.json", "preflight.json", "manifest.json", "status", "health"]
)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"a": NaN}',
        b"\xff\xfe",
        b'{"x": 1e999}',
        b"[" * 100_000,
        b'{"jobs": 7}',
        b'{"s": "\\ud800"}',
    ],
)
def test_a_damaged_document_never_breaks_the_results_and_never_passes(
    tmp_path: Path, name: str, content: bytes
) -> None:
    run = make_run(tmp_path / "r1", {"health": document("health", dict.fromkeys(FOUR_PASS, "pass"))})
    path = {"status": run.diagnostics / "status.json", "health": run.job_results("health")}.get(name, run.folder / name)
    path.write_bytes(content)
    results = check_schema(build_results(run))
    assert results["verdict"]["overall"] != "pass"
    if name in ("status", "health"):
        assert results["verdict"]["dimensions"]["integrity"] == "not_measured"


def test_a_document_with_wrong_types_everywhere_is_still_valid_results(tmp_path: Path) -> None:
    wrong = {
        "findings": [7, {"id": 3}, {**finding(), "severity": "catastrophe"}, {**finding(), "confidence": 1e9}],
        "metrics": [None, {"id": ""}, metric(value="high"), metric(interval=[3, 1]), metric(baselines=[1])],  # type: ignore[arg-type]
        "pictures": [{"path": 4}, {"path": "../../etc/passwd", "kind": "image"}, {"path": "a.svg", "kind": "svg"}],
        "verdict": {"dimensions": {"integrity": "excellent", "beauty": "pass"}, "reasons": [1]},
        "headline": {"a": 1},
    }
    results = check_schema(build_results(make_run(tmp_path / "r1", {"health": document("health") | wrong})))
    assert results["pictures"] == []
    assert [f["confidence"] for f in results["findings"]] == [1.0]
    assert len(results["metrics"]) == 3
    assert results["verdict"]["dimensions"]["integrity"] == "not_measured"
    assert any("passwd" in note for note in results["notes"])


def test_terminal_escapes_and_overrides_of_a_node_do_not_reach_results_json(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\u202egpj.exe\ud800"
    run = make_run(tmp_path / "r1", {"health": document("health", headline=evil, findings=[finding(title=evil)])})
    text = json.dumps(build_results(run), ensure_ascii=False)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\ud800" not in text


def test_the_users_own_config_stays_out_of_what_gets_passed_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r1", {"health": document("health")})
    assert "hunter2" not in dump_results(build_results(run))


def test_a_job_name_that_is_a_path_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.mkdir()
    (outside / "secret.json").write_text(json.dumps(document("secret", {"integrity": "pass"})))
    run = make_run(tmp_path / "r1", {}, plan_over={"jobs": [{"name": "../../secret"}]})
    assert build_results(run)["jobs"] == {}


def test_a_document_that_is_a_symbolic_link_is_not_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r1", {"health": document("health", FOUR_PASS)})
    target = tmp_path / "elsewhere.json"
    run.job_results("health").replace(target)
    run.job_results("health").symlink_to(target)
    assert build_results(run)["verdict"]["dimensions"]["integrity"] == "not_measured"


def test_an_empty_folder_gives_results_that_claim_nothing(tmp_path: Path) -> None:
    results = check_schema(build_results(RunLayout(tmp_path / "r1")))
    assert results["attempt"]["state"] == "not_started"
    assert results["verdict"]["sentence"] == "No verdict: nothing was measured. The run did not start."


def test_times_stand_in_provenance_alone(tmp_path: Path) -> None:
    quick = make_run(tmp_path / "a" / "r1", {"health": document("health")})
    slow = make_run(
        tmp_path / "b" / "r1",
        {"health": document("health")},
        states={"health": {"state": "succeeded", "ended_at": 99.0}},
        plan_over={"created_at": "2031-01-01T00:00:00+00:00"},
        provenance={"created_at": "2031-01-01T00:00:00+00:00", "stage_seconds": {"follow": 1e4}},
    )
    one, other = build_results(quick), build_results(slow)
    assert one.pop("provenance") != other.pop("provenance")
    assert one == other


def test_a_comparison_names_what_got_worse_and_stays_valid(tmp_path: Path) -> None:
    before = build_results(make_run(tmp_path / "r1", {"reconstruct": document("reconstruct", metrics=[metric()])}))
    run = make_run(tmp_path / "r2", {"reconstruct": document("reconstruct", metrics=[metric(value=0.1)])})
    results = check_schema(build_results(run, [row_from_results(before)]))
    assert results["comparison"]["against"] == "r1"
    assert results["regressions"] == ["fmri.voxelwise_correlation (fmri): 0.21 → 0.1, worse (higher is better)"]


def test_long_own_keys_stay_in_the_document_and_are_named(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "r1", {"health": document("health", tensors=[{"name": "x" * 100}] * 5000, header={"n": 1})}
    )
    entry = build_results(run)["jobs"]["health"]
    assert entry["only_in_document"] == ["tensors"]
    assert entry["numbers"] == {"header": {"n": 1}}
