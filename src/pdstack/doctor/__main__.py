"""The doctor on one host, without Ansible.

    python3 -m pdstack.doctor [--plan FILE] [--facts FILE] [--json] [--all] [--stage STAGE]... [OPTIONS OF THE PROBE]

Without a plan, what is on the PCI bus is what is wanted. Status 0: all right, 1: warnings, 2: failures. It changes
nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pdstack.doctor import checks, plan, probe, report


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe this host, judge it, print the result."""
    parser = argparse.ArgumentParser(
        prog="pdstack.doctor", parents=[probe.parser(add_help=False)], add_help=False,
        description="Check this GPU host. Changes nothing.",
    )  # fmt: skip
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="JSON of what is wanted, beside what the defaults are"
    )
    parser.add_argument("--facts", type=Path, metavar="FILE", help="judge what the probe printed elsewhere")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--all", action="store_true", help="a line for checks that are right or skipped, too")
    parser.add_argument("--stage", action="append", default=[], choices=checks.STAGES, help="only checks of this stage")
    options = parser.parse_args(arguments)
    wanted = {}
    try:
        if options.plan:
            wanted = json.loads(options.plan.read_text())
        if options.facts:
            facts = json.loads(options.facts.read_text())
        else:
            options.path += list(wanted.get("disk_mib") or plan.empty()["disk_mib"])
            facts = probe.probe(probe.Host(options.root), options)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"pdstack.doctor: {error}\n")
        return 2
    if unknown := sorted(set(wanted) - set(plan.empty())):
        sys.stderr.write(f"pdstack.doctor: the plan has no {', '.join(unknown)}; it has {', '.join(plan.empty())}\n")
        return 2
    judged = checks.evaluate(facts, plan.default(facts) | wanted, stages=options.stage)
    hosts = {str(wanted.get("host") or "this host"): [result.as_dict() for result in judged]}
    content = report.report(hosts)
    if options.json:
        sys.stdout.write(json.dumps({**content, "facts": facts}, indent=2, sort_keys=True) + "\n")
    else:
        sys.stdout.write("\n".join(report.render(hosts, everything=options.all)) + "\n")
    return int(content["status"])


if __name__ == "__main__":
    sys.exit(main())
