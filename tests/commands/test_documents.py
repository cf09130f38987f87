"""Commands of the documents, and of the docstrings of recipes and tools, are run, or checked and listed with a reason.

A block without a language in README.md, CONTRIBUTING.md and docs/*.md holds commands; output, data and code name their
language (text, json, yaml, python). In a docstring, and in the comment at the head of a shell script, a command is a
line that begins with a program. Three things can happen to a command:

- RUN: it is run as it stands, but for the folders in FOLDERS.
- `<!-- tested -->` stands before its block: a test of its own runs it (ELSEWHERE).
- NOT_RUN has a reason for it. Then its program exists, and the program's own parser takes its options; overrides are
  composed and checked as the recipes do it (parse_check.py).

A command that is none of these fails the test.
"""

import ast
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from programs import REPOSITORY, python, run_ranks, succeeded

from molmo2_nemo.command_line import refuse_unknown_overrides
from molmo2_nemo.config import flags

DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PROGRAMS = [*sorted((REPOSITORY / "recipes").glob("*.py")), *sorted((REPOSITORY / "tools").glob("**/*.py"))]
SCRIPTS = [*sorted((REPOSITORY / "tools").glob("**/*.sh")), *sorted((REPOSITORY / "slurm").glob("*.s*"))]

# Run as they stand, in the order of the documents.
RUN = (
    r"python recipes/\w+\.py .*--cfg job.*",
    r"python tools/plan\.py --config-name \w+ model=molmo2_8b gpus=8 hardware=h100_8",
    r"python tools/download\.py (list|plan|how|doctor) ?.*",
    r"python tools/inspect_data\.py --config-name stage\d data=sample --samples (20|500) .*",
    r"(python|torchrun .*) recipes/.* run_dir=runs/tour/.*",
    r"python tools/(export_hf|ask|evaluate)\.py runs/tour/.*",
    r"python tools/dev/make_(blends|settings)\.py --check",
)

# Documents whose blocks after `<!-- tested -->` are run by another test.
ELSEWHERE = {
    "own_data.md": "tests/commands/test_prepare.py",
    "finetune.md": "tests/commands/test_finetune_page.py",
    "datasets.md": "tests/ranks/test_stage_pass.py",
}

# Why a command is not run here; its program and its arguments are checked all the same. (pattern, reason)
NOT_RUN = (
    (r"(tools/quickstart\.sh|tools/setup\.sh|tools/test\.sh).*", "test_quickstart.py runs it; or it runs this test"),
    (r"python tools/report_quickstart\.py .*", "part of tools/quickstart.sh, which test_quickstart.py runs"),
    (r"python tools/make_sample_data\.py .*", "a minute; the fixture `sample` runs it at a hundredth of the size"),
    (r"(source|export|cp|hf|aws) .*", "of the shell, or another program's"),
    (r"nsys .*", "needs NVIDIA's Nsight Systems and GPUs"),
    (r"wandb .*", "needs an account at Weights & Biases"),
    (r"(ruff|pytest) .*", "other programs of the environment"),
    (r"python3\.12 -m pip .*|pip install .*", "needs the network"),
    (r"vllm serve .*", "needs vLLM and a GPU; test_serving.py compares what it reads"),
    (r"tools/install_gpu\.sh", "needs the network; test_install.py runs it with a stand-in for pip"),
    (r"for .*", "a loop of the shell around a command that stands in the document, too"),
    (
        r"(sbatch|srun|scancel|slurm/submit\.sh|docker|enroot|apptainer) .*",
        "needs a cluster; tests/slurm runs the scripts",
    ),
    (r"python tools/(status|preflight)\.py .*", "needs a run on a cluster; tests/slurm runs it"),
    (r"python tools/(rehearse|dev/rehearsal_table)\.py .*", "minutes; tests/ranks/test_rehearsal.py runs it, smaller"),
    (r"python tools/check/kernels\.py .*", "minutes; tests/unit/test_kernels.py compiles the same, smaller"),
    (r"bash slurm/.*|slurm/.*", "needs a cluster; tests/slurm runs the scripts"),
    (r"(python|torchrun .*) recipes/.*/(models|data)/.*", "needs released weights or data"),
    (r"torchrun --nproc-per-node 8 .*", "needs eight GPUs"),
    (
        r"(python|torchrun .*) recipes/.*",
        "trains for hours, or needs data that are not here; training.md's tour trains",
    ),
    (
        r"(python )?tools/download(\.py (fetch|doctor|verify)|_\w+\.(py|sh)) ?.*",
        "needs the internet; test_fetch.py has servers",
    ),
    (
        r"python tools/prepare\.py .*",
        "needs raw data; test_prepare.py, test_prepare_stage.py and test_prepare_in_parts.py do",
    ),
    (r"python tools/inspect_data\.py .*", "needs prepared data, or takes long; others of its kind are run"),
    (r"python tools/(import_hf|export_hf|ask|report)\.py .*", "needs weights or a run; test_quickstart.py runs them"),
    (
        r"(python|torchrun .*) tools/evaluate\.py .*",
        "needs a model and its data; test_evaluate.py and training.md's tour run it",
    ),
    (r"python tools/plan\.py .*", "another of its kind is run; test_planner.py plans every preset"),
    (r"(python|torchrun .*) tools/(bench|check)/.*", "minutes, or a GPU; tests of their own run them at toy sizes"),
    (r"python tools/dev/\w+\.py.*|tools/dev/\w+\.sh.*", "writes files of the repository; its --check is run"),
)

# Words of the documents -> words that stand for them when arguments are checked.
STAND_IN = {
    "model=hf model.hf_path=/models/Molmo2-8B": "model=molmo2_8b",
    "model=hf model.hf_path=/models/Molmo2-4B": "model=molmo2_4b",
    "model=hf model.hf_path=runs/finetune/hf": "model=tiny",
    "stage1|stage2|stage3|all": "stage1",
    "[any override of a recipe]": "",
    "[OVERRIDE...]": "",
    "[MORE...]": "",
    "[NAME ...]": "",
    "$DATA_ROOT": "/data/molmo2",
    " ...": "",
    "HF_DIR...": "HF_DIR",
    "RANKS": "8",
}
# What a command may have or not; not a list, `key=[1,2]`.
LEFT_OUT = re.compile(r"(?<!=)\[([^\[\]]*)\]")
COMMAND = re.compile(r"(python3?\.?1?2? (-m |tools/|recipes/)|torchrun |srun |sbatch |slurm/\w+\.s|tools/\w+)")


def logical_lines(text: str) -> list[str]:
    """Commands of a block: continued lines are joined, comments left out."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip()
        found += [" ".join(line.split())] if line else []
    return found


def of_document(path: Path) -> list[tuple[str, bool]]:
    """(command, whether a test of its own runs it)."""
    blocks = re.findall(r"^(<!-- tested -->\n)?```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    return [(line, bool(mark)) for mark, kind, block in blocks if not kind for line in logical_lines(block)]


def of_docstring(path: Path) -> list[tuple[str, bool]]:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return [(line, False) for line in logical_lines(text) if COMMAND.match(line)]


def of_head(path: Path) -> list[tuple[str, bool]]:
    """Of the comment at the head of a shell script, where commands are indented."""
    head = "\n".join(
        line.removeprefix("#").removeprefix("    ") if line.startswith("#     ") else ""
        for line in path.read_text().splitlines()[1:30]
    )
    return [(line, False) for line in logical_lines(head) if COMMAND.match(line)]


@cache
def commands() -> dict[str, list[tuple[str, bool]]]:
    """File -> its commands."""
    found = {path: of_document(path) for path in DOCUMENTS}
    found |= {path: of_docstring(path) for path in PROGRAMS}
    found |= {path: of_head(path) for path in SCRIPTS}
    return {str(path.relative_to(REPOSITORY)): lines for path, lines in found.items() if lines}


def is_run(command: str) -> bool:
    return any(re.fullmatch(pattern, command) for pattern in RUN) and not LEFT_OUT.search(command)


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN if re.fullmatch(pattern, command)), None)


def test_every_command_is_run_or_has_a_reason():
    assert sum(map(len, commands().values())) > 100
    for file, lines in commands().items():
        for command, elsewhere in lines:
            assert elsewhere or is_run(command) or reason(command), f"{file}: {command}: add it to RUN or NOT_RUN"
            if elsewhere:
                assert Path(file).name in (REPOSITORY / ELSEWHERE[Path(file).name]).read_text()
    for pattern in (*RUN, *(pattern for pattern, _ in NOT_RUN)):
        lines = [command for lines in commands().values() for command, _ in lines]
        assert any(re.fullmatch(pattern, command) for command in lines), f"{pattern} matches no command any more"


def to_check(command: str) -> tuple[list[str], int | None] | None:
    """(the program's path and its arguments, ranks) of a command with a program of ours; None for another's."""
    for words, others in STAND_IN.items():
        command = command.replace(words, others)
    while command != (command := re.sub(LEFT_OUT, r"\1", command)):
        pass
    words, ranks = shlex.split(command), None
    if words[0] == "for":  # for x in ...; do echo "COMMAND"; done > FILE
        words = shlex.split(re.search(r'echo "(?:\[.*\|\| )?(.*?)"', command)[1].replace("$k", "0"))
    if words[0] == "source":
        words = words[words.index("&&") + 1 :] if "&&" in words else words
    if words[0] == "nsys":
        words = words[words.index("torchrun") :]
    if words[0] in ("python", "torchrun", "srun", "sbatch"):
        launcher, words = words[0], words[1:]
        words = words[1:] if words[0] == "python" else words
        while words[0].startswith("-"):
            if words[0] == "--nproc-per-node":
                ranks = int(words.pop(1))
            words.pop(0)
        ranks = 1 if launcher == "python" else ranks
    if words[0] == "tools/download_by_stage.sh":  # its options are those of download.py
        words = ["tools/download.py", "fetch", "--stage", words[1].removeprefix("stage"), *words[2:]]
    if not re.match(r"(tools|recipes|slurm)/", words[0]) or words[0] == "tools/test.sh":
        return None
    if words[0].startswith("slurm/"):
        ranks = 128  # --nodes=16, the default of stage 3
    return words, ranks


def test_programs_take_the_commands(tmp_path):
    """Also of those that are run elsewhere, which is cheap; the ones that other programs take are left out."""
    found = [(file, command) for file, lines in commands().items() for command, _ in lines if not is_run(command)]
    found = [(file, command, to_check(command)) for file, command in dict.fromkeys(found)]
    found = [entry for entry in found if entry[2] is not None]
    assert len(found) > 50
    # What has to be refused: an unknown option, key and program, a layout of more ranks than there are.
    wrong = [
        (["tools/export_hf.py", "runs/x", "OUT", "--no-such-option"], 1),
        (["recipes/stage2_sft.py", "train.no_such_key=1"], 1),
        (["tools/no_such_program.py"], 1),
        (["recipes/stage3_long_context.py", "parallel.tensor_model_parallel_size=4"], 8),
    ]
    (tmp_path / "commands.json").write_text(json.dumps([*(checked for _, _, checked in found), *wrong]))
    result = succeeded(python("tests/commands/parse_check.py", tmp_path / "commands.json"))
    verdicts = list(map(json.loads, result.stdout.splitlines()))
    assert len(verdicts) == len(found) + len(wrong) and None not in verdicts[len(found) :]
    assert [(file, command, why) for (file, command, _), why in zip(found, verdicts) if why is not None] == []


@pytest.mark.slow
def test_commands_run(sample, tmp_path):
    (tmp_path / "raw").mkdir()
    done = set()
    for command in (line for lines in commands().values() for line, _ in lines if is_run(line)):
        if command in done:
            continue
        done.add(command)
        # Folders of its own, and the smaller sample data.
        words = command.replace("runs/", f"{tmp_path}/runs/").replace("data/sample", str(sample))
        if "data=sample" in words:
            words = words.replace("data=sample", f"data=sample data.root={sample}")
        program, *arguments = shlex.split(words)
        environment = {"DATA_ROOT": str(tmp_path)}
        if program == "torchrun":
            assert arguments.pop(0) == "--nproc-per-node"
            result = run_ranks(int(arguments.pop(0)), *arguments, **environment)
        else:
            result = python(*arguments, **environment)
        # A set that is not there and a plan that does not fit are answers, too.
        assert result.returncode in (0, 1) if "tools/download.py" in command else succeeded(result), command
        assert "Traceback" not in result.stderr, command
    assert len(done) >= 12


# Names


def texts() -> list[tuple[str, str]]:
    return [(path.name, path.read_text()) for path in DOCUMENTS]


def spans(text: str) -> list[str]:
    """What stands between backticks, outside of blocks."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def test_files_named_in_the_documents_exist():
    everywhere = {path.name for path in REPOSITORY.glob("[!.]*/**/*.*")} | {p.name for p in REPOSITORY.iterdir()}
    made = {"slurm/site.env", "conf/model/NAME.yaml", "tests/published/NAME.yaml"}  # by the reader
    checked = 0
    for document, text in texts():
        for name in [word for span in spans(text) for word in span.split()]:
            if (
                re.fullmatch(r"(tools|recipes|conf|molmo2_nemo|slurm|docs|tests)/[\w./*]*\w/?", name)
                and name not in made
            ):
                assert list(REPOSITORY.glob(name)), f"{document}: {name}"
                checked += 1
            elif re.fullmatch(r"\w+\.(py|sh|sbatch)", name):
                assert name in everywhere, f"{document}: {name}"
        folder = REPOSITORY / ("docs" if (REPOSITORY / "docs" / document).exists() else "")
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert link.startswith("https://") or (folder / link).exists(), f"{document}: {link}"
            checked += 1
    assert checked > 80


def test_keys_named_in_the_documents_exist():
    checked = 0
    for _, text in texts():
        for key in re.findall(
            r"\b((?:model|parallel|data|optim|schedule|train)\.[a-z_][\w.]*\w)", " ".join(spans(text))
        ):
            if key.split(".")[-1] not in ("py", "md", "yaml") and key not in ("data.mine", "data.more"):  # any name
                key = key.replace("schedule.STAGE", "schedule.stage1")
                refuse_unknown_overrides([f"{key}=${{name}}"])  # a reference, whatever the key's type
                checked += 1
    assert checked > 100


def test_options_named_in_the_documents_exist():
    """Between backticks: options of our programs, or of the others that are named here."""
    others = "--nproc-per-node --config-name --cfg --nodes --time --gpus-per-node --exclude --array --signal --output"
    others = {*others.split(), "--check", "--no-deps", "--no-build-isolation", "--local-dir", "--config-dir"}
    others |= {"--trust-remote-code", "--max-num-batched-tokens", "--media-io-kwargs"}  # vLLM's
    code = [*PROGRAMS, *SCRIPTS, *(REPOSITORY / "molmo2_nemo").glob("**/*.py")]
    known = {option for path in code for option in re.findall(r"--[a-z][a-z-]*[a-z]", path.read_text())} | others
    # Of other trainers: what our recipes answer with the setting to write.
    answered = {*flags.KEYS, *flags.WORDS, *(key.rpartition(".")[2] for key in flags.types_of_keys())}
    known |= {f"--{name.replace('_', '-')}" for name in answered}
    for document, text in texts():
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", " ".join(spans(text))):
            assert option in known, f"{document}: {option}"


def test_the_readme_is_short():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120


def sentences() -> str:
    """All strings of the code: f-strings with ... in place of values, and shell scripts as they are."""
    found = []
    for path in [*PROGRAMS, *(REPOSITORY / "molmo2_nemo").glob("**/*.py"), *(REPOSITORY / "slurm").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("%d", "..."))
    scripts = "\n".join(path.read_text() for path in SCRIPTS)
    return "\n".join(found) + re.sub(r"\$\{?\w+\}?", "...", scripts)


def test_messages_in_troubleshooting_are_those_of_the_code():
    """A part in backticks in the first column is a message of ours, but for those of Slurm, Python and vLLM."""
    of_others = ("Requested node configuration", "Invalid account or partition", "ModuleNotFoundError")
    of_others += ("JobLaunchFailure", "launch failed requeued held", "'Molmo2Config' object has no attribute")
    code, checked = sentences(), 0
    for line in (REPOSITORY / "docs" / "troubleshooting.md").read_text().splitlines():
        if not re.match(r"\| .*`", line):
            continue
        for message in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
            if not message.startswith(of_others):
                for part in filter(None, (part.strip(" ;") for part in message.split("..."))):
                    assert part in code, f"{message}: {part!r} is in no string of the code"
                checked += 1
    assert checked > 60
