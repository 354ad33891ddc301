"""The pages: links lead somewhere, commands exist, words are the field's."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch

from common.cli import parse
from common.config.load import load_config
from common.config.reference import reference
from common.config.schema import QuantizationConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")])
TEMPLATES = sorted((ROOT / "common/reporting").glob("*.j2"))
FAMILIES = {path.parent.name for path in ROOT.glob("*/adapter.py")}
# Words of its own that the project once had, each with the field's.
WORDS = {
    r"tables? of (levels|integers|8-bit)": "codebook",
    r"even(ly spaced)? levels": "uniform",
    r"numbers? of entries": "indices",
    r"(significant|binary) digits|few digits": "significand bits, minifloat",
    r"numbers of negative codes": "zero point",
    r"refined rounding": "coordinate descent",
    r"gr[ea]y (bars|borders)": "letterbox padding",
    r"input_margin": "range headroom",
    r"products? of (the )?inputs|second moments": "Hessian",
    r"inputs? of (a )?products?": "attention matmul inputs",
    r"against full precision": "fidelity",
    r"agreement": "fidelity",
    r"w[io]ns? back": "recovered",
    r"spends? bits|budgets?": "mixed precision under an average-bit limit",
    r"(?<!standard )deviations?": "standard deviation",
    r"goes on where it was": "resumable",
    r"\blut\b": "codebook",
}


def named(path):
    return str(path.relative_to(ROOT))


def fragments(page):
    """The anchors of a page's headings as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def lines_of_code(page):
    """Indented and fenced lines, with lines that end in a backslash joined, and what is quoted in a sentence."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^(?: {4,}|\$ )(.+)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)


def commands(page):
    """The words after `zsqdet` of every command of a page that names no placeholder."""
    for line in lines_of_code(page):
        found = re.match(r"zsqdet ([a-z].*)$", line.split(" #")[0].strip())
        # `run|train` is a choice of commands, `--to a|b` one of words, and a command alone is a name.
        if found and "|" not in found[1].replace("\\|", "|") and (" " in found[1] or found[1] in ("keys",)):
            yield found[1]


ZSQDET = sorted({(page, text) for page in PAGES for text in commands(page)})
MODULES = sorted(
    {
        (page, module)
        for page in PAGES
        for line in lines_of_code(page)
        for module in re.findall(r"python -m ([\w.]+)", line)
    }
)
SCRIPTS = sorted(
    {(page, path) for page in PAGES for line in lines_of_code(page) for path in re.findall(r"scripts/\w+\.sh", line)}
)


def test_there_is_something_to_check():
    assert len(PAGES) > 15
    assert len(ZSQDET) > 10
    assert {"fidelity", "codebook"} <= set(WORDS.values())


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_relative_link_leads_to_a_file_and_to_a_heading_that_exists(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, fragment = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), f"{named(page)}: {target} does not exist"
        assert not fragment or fragment in fragments(other), f"{named(page)}: {target} has no such heading"


@pytest.mark.parametrize(("page", "text"), ZSQDET, ids=[f"{p.stem}-{i}" for i, (p, _) in enumerate(ZSQDET)])
def test_every_zsqdet_command_of_a_page_is_one_and_its_configuration_loads(page, text, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if text.endswith("--help"):
        with pytest.raises(SystemExit, match=r"^0$"):
            parse(shlex.split(text))
        return
    arguments = parse(shlex.split(text.replace("...", "")))
    config = getattr(arguments, "config", None)
    # CONFIG and RUN are placeholders; what lies in runs/ is made by other commands.
    if config is None or not config.suffix or config.parts[0] in ("RUN", "runs"):
        return
    if not config.exists():  # one of the reader's own: those of the page itself
        assert "/" not in str(config), f"{named(page)}: {config} does not exist"
        if config.suffix == ".pt":
            config = ROOT / "tools/shapes/micro_yolo11.safetensors"
        else:
            config = tmp_path / config.name
            config.write_text("family: yolo11\nweights: best.pt\n")
    load_config(config, arguments.overrides)


@pytest.mark.parametrize(("page", "module"), MODULES, ids=[f"{p.stem}-{m}" for p, m in MODULES])
def test_every_module_that_a_page_runs_exists(page, module):
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{named(page)}: python -m {module}"


@pytest.mark.parametrize(("page", "path"), SCRIPTS, ids=[f"{p.stem}-{s}" for p, s in SCRIPTS])
def test_every_script_that_a_page_names_exists(page, path):
    assert (ROOT / path).is_file(), f"{named(page)}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_configuration_and_page_that_a_text_names_exists(page):
    for name in re.findall(r"\b((?:configs|docs|results|tests)/[\w/.-]+\.(?:yaml|md|py))", page.read_text()):
        assert (ROOT / name).is_file(), f"{named(page)}: {name} does not exist"


def test_every_page_that_code_names_exists():
    sources = [path for folder in ("common", "tools", "configs", *FAMILIES) for path in (ROOT / folder).rglob("*")]
    for path in sources:
        if path.suffix in (".py", ".yaml"):
            for name in re.findall(r"\b(?:docs|results)/[\w/.-]+\.md", path.read_text(encoding="utf-8")):
                assert (ROOT / name).is_file(), f"{named(path)}: {name} does not exist"


def test_the_settings_that_pages_show_as_yaml_load(tmp_path):
    shown = 0
    for page in PAGES:
        for block in re.findall(r"(?:^ {4}.+\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
            lines = [line[4:] for line in block.splitlines()]
            if lines[0].startswith("family: "):
                (tmp_path / "experiment.yaml").write_text("\n".join(lines))
                load_config(tmp_path / "experiment.yaml")
                shown += 1
    assert shown >= 2


def test_the_quantizer_that_the_page_shows_rounds_to_its_levels():
    text = (ROOT / "docs/add-a-quantizer.md").read_text(encoding="utf-8")
    code = max(re.findall(r"(?:^(?: {4}.*)?\n)+", text, re.MULTILINE), key=len)
    names = {}
    exec(textwrap.dedent(code), names)
    quantizer = names["Quantizer"]((3, 1, 1, 1), batched=False)
    weight = torch.randn(3, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer(weight), weight)
    quantizer.start_weight(weight, 4, 0, QuantizationConfig())
    levels = quantizer.levels()
    assert levels.tolist() == [-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64]
    rounded = quantizer(weight)
    assert torch.isin((rounded / quantizer.scale).round(decimals=4), levels).all()
    distances = (weight[..., None] - levels * quantizer.scale[..., None]).abs()
    torch.testing.assert_close((rounded - weight).abs(), distances.amin(-1))
    rounded.square().sum().backward()
    assert torch.isfinite(quantizer.scale.grad).all()
    other = names["Quantizer"]((3, 1, 1, 1), batched=False)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(weight), rounded)


def complaints(text):
    return [f"{m[0]!r}: say {better}" for word, better in WORDS.items() for m in re.finditer(word, text, re.IGNORECASE)]


@pytest.mark.parametrize(
    "path", [p for p in (*PAGES, *TEMPLATES) if p.name != "CHANGELOG.md"], ids=named
)  # has old names
def test_pages_and_report_speak_the_fields_words(path):
    text = re.sub(r"{[{%].*?[%}]}", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)  # names in templates stay
    assert not complaints(text)


@pytest.mark.parametrize("command", ["", "run", "evaluate", "sensitivity", "predict", "report", "info"])
def test_help_speaks_the_fields_words(command, capsys):
    with pytest.raises(SystemExit):
        parse([*command.split(), "--help"])
    assert not complaints(capsys.readouterr().out + reference())


def test_the_word_list_finds_what_it_is_for():
    assert complaints("Grey bars win back what a budget of even levels loses.")
    assert not complaints("Letterbox padding recovers what an average-bit limit of uniform levels loses.")
