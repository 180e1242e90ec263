"""An SGLang that has moved most of what the plugin changes: it serves, and says what it does without."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from engines.served.plugin_path import plugin_path
from engines.sglang.command import PLUGIN

# As much of an SGLang as the plugin cannot do without, and what it hangs its socket on.
SGLANG = {
    "uvicorn.py": "class Config:\n    pass\n",
    "sglang/version.py": '__version__ = "9.9.9"\n',
    "sglang/srt/runtime_context.py": """
from types import SimpleNamespace
def get_parallel():
    return SimpleNamespace(pp_rank=0, pp_size=2, tp_rank=0, tp_size=1)
""",
    "sglang/srt/managers/scheduler.py": """
from types import SimpleNamespace
class Scheduler:
    page_size, max_total_num_tokens, max_req_input_len = 4, 64, 60
    model_config = SimpleNamespace(vocab_size=100, hf_eos_token_id=[1], num_hidden_layers=8)
    def run_event_loop(self):
        pass
""",
}
SCRIPT = """
import json
from flexpiped_sglang.registration import register
register()
from sglang.srt.managers.scheduler import Scheduler
scheduler = Scheduler()
scheduler.run_event_loop()
rank = scheduler.flexpiped
print(json.dumps({"ready": rank._ready(), "counters": rank._counting.counters()}))
"""


def test_it_serves_without_what_it_has_not(tmp_path: Path) -> None:
    for name, content in SGLANG.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    with TemporaryDirectory(prefix="flexpiped-") as sockets:  # their paths must be short
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": f"{tmp_path}{os.pathsep}{plugin_path(PLUGIN)}",
                "FLEXPIPED_SGLANG_DIR": sockets,
                "FLEXPIPED_SGLANG_NICE": "0",
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    said = json.loads(done.stdout)
    assert said["ready"]["refactor_refusal"] == "moves in place are tested with SGLang 0.5.23; this is 9.9.9"
    assert not said["ready"]["resumes_seeded"]
    assert (said["counters"]["kv_blocks_capacity"], said["counters"]["running"]) == (16, 0)
    for without in (
        "a seeded draw goes on differently after a replay",
        "penalties of output begin anew after a replay",
        "a move through idle schedulers takes seconds",
        "how busy ranks are is not known",
        "what its scheduler does is not counted",
    ):
        assert f": {without}\n" in done.stderr
