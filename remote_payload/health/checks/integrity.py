"""Is the file what was written? Structure, checksums, and whether it held still."""

from __future__ import annotations

from collections.abc import Iterator

from remote_payload.checkpoint.findings import header_findings
from remote_payload.checkpoint.records import integrity_problem
from remote_payload.health.checks.check import Check
from remote_payload.health.facts import HealthFacts
from remote_payload.wire.results import Dimension, Finding, Severity


def _structure(facts: HealthFacts) -> list[Finding]:
    return header_findings(facts.header)


def _checksums(facts: HealthFacts) -> Iterator[Finding]:
    mismatches = facts.scan.checksums.mismatches
    if not mismatches:
        return
    holders = {t.storage_key: t.name for t in reversed(facts.header.tensors) if t.storage_key is not None}
    named = [holders.get(m.record.rpartition("/")[2], m.record)[:200] for m in mismatches]
    yield Finding(
        id="integrity.crc_mismatch",
        severity=Severity.ERROR,
        title=f"{len(mismatches)} of {facts.scan.checksums.checked} records are not the bytes that were written",
        dimension=Dimension.INTEGRITY,
        where=tuple(named[:50]),
        evidence={
            "records": [
                {
                    "record": m.record[:200],
                    "stated": f"{m.stated:08x}",
                    "computed": f"{m.computed:08x}",
                    "bytes": m.size,
                }
                for m in mismatches[:20]
            ],
            "checked": facts.scan.checksums.checked,
        },
        explanation="The archive keeps a CRC-32 of every record. torch.load never compares it, so such a file loads "
        "without a word and computes with damaged weights.",
        confidence=1.0,
        refuted_by="A second copy of the file whose checksums agree, or a writer known to leave wrong checksums.",
        action="Copy the file again and compare; if the original has the same damage, use an earlier checkpoint.",
    )


def _readable(facts: HealthFacts) -> Iterator[Finding]:
    errors = facts.scan.read_errors
    if errors:
        yield integrity_problem(
            "integrity.unreadable",
            f"{len(errors)} records could not be read",
            tuple(name[:200] for name in errors),
            {"errors": {name[:200]: text[:300] for name, text in list(errors.items())[:10]}},
            "The operating system gave an error, or the file ended, where bytes of a record should be.",
            "Check the disk, then copy the file again.",
        )
    if facts.changed is not None:
        yield integrity_problem(
            "integrity.changed_while_read",
            "The file changed while it was read",
            (),
            {"change": facts.changed},
            "Size, modification time or identity differ between the start and the end of the reading, so the numbers "
            "may belong to two different saves.",
            "Evaluate again when nothing writes to the file; save under a temporary name and rename.",
        )


CHECKS = (
    Check(Dimension.INTEGRITY, "every record lies inside the file and has its tensors' size", _structure),
    Check(
        Dimension.INTEGRITY,
        "every record's checksum",
        _checksums,
        lambda facts: facts.scan.checksums.checked > 0,
    ),
    Check(Dimension.INTEGRITY, "every byte could be read and the file held still", _readable),
)
