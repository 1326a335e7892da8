"""Print what was deployed, how it was found and what to try, at the end of a run that verified it."""

from __future__ import annotations

import sys
from pathlib import Path

from ansible.plugins.callback import CallbackBase

# Found from here, so that a plain `ansible-playbook site.yml` works too.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.deploy import summary

DOCUMENTATION = """
name: pdstack_summary
type: aggregate
short_description: Prints the table of services and the KV path
description:
  - A play asks for it by C(set_stats) with C(pdstack_deployment), the path of the deployment's file on the controller.
  - Says nothing when no play asked or any host failed.
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "pdstack_summary"
    CALLBACK_NEEDS_ENABLED = True

    def v2_playbook_on_stats(self, stats) -> None:
        asked = stats.custom.get("_run", {}).get("pdstack_deployment")
        if not asked or stats.failures or stats.dark:
            return
        path = Path(asked)
        if path.is_file():
            self._display.banner("SUMMARY")
            self._display.display(summary.load(path))
