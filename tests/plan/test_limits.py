"""The memory that containers and shells leave to a process, and the plan that heeds it."""

import json
import subprocess
import sys

import pytest

from lorakeet.plan.limits import count_allowed_bytes


@pytest.fixture
def system(tmp_path):
    """Control groups as the kernel shows them; groups are paths, files are their contents."""

    def write(cgroup, **groups):
        (tmp_path / "process").mkdir()
        (tmp_path / "process" / "cgroup").write_text(cgroup)
        for folder, files in groups.items():
            place = tmp_path / "groups" / folder.replace("_", "/")
            place.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (place / name).write_text(content)
        return count_allowed_bytes(tmp_path / "groups", tmp_path / "process")

    return write


def test_the_tightest_of_the_groups_around_counts_and_dropped_files_are_free(system):
    outer = {"memory.max": "1000\n", "memory.current": "700\n",
             "memory.stat": "anon 5\ninactive_file 100\n"}  # fmt: skip
    inner = {"memory.max": "max\n", "memory.current": "9\n"}
    assert system("0::/a/b\n", a=outer, a_b=inner) == 1000 - 700 + 100


def test_the_first_version_names_its_files_otherwise(system):
    group = {"memory.limit_in_bytes": "500\n", "memory.usage_in_bytes": "600\n"}
    assert system("9:cpu:/x\n4:memory:/box\n", memory_box=group) == 0


@pytest.mark.parametrize("cgroup", ["", "0::/\n", "nonsense"])
def test_without_limits_nothing_is_told(system, cgroup):
    assert system(cgroup) is None


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux")
def test_what_a_shell_leaves_is_what_the_plan_says_is_free(tmp_path):
    """``lorakeet plan`` under ulimit -v: nothing fits, and the remedy is told."""
    recipe = {"base": "starter", "data": {"train": "rows.jsonl"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    call = f"ulimit -v {500_000}; {sys.executable} -m lorakeet.cli plan recipe.yaml --json"
    done = subprocess.run(["bash", "-c", call], cwd=tmp_path, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["machine"]["free_memory_bytes"] < 500_000 * 1024
    assert plan["chosen"] is None
    assert plan["remedies"]
