"""Print what makes a shell complete commands and options: for bash, zsh or fish.

bash and zsh: add `eval "$(qsa completion bash)"` (or zsh) to your ~/.bashrc (~/.zshrc). fish: write the output to
~/.config/fish/completions/qsa.fish.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence

from .shared import OK, command_parser, first_line

ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
BASH = """\
_qsa() {{
    local words
    case "${{COMP_WORDS[1]}}" in
{cases}
        *) words="{commands} --help --version" ;;
    esac
    [ "$COMP_CWORD" -eq 1 ] && words="{commands} --help --version"
    case "$2" in
        -*) COMPREPLY=($(compgen -W "$words" -- "$2")) ;;
        *) [ "$COMP_CWORD" -eq 1 ] && COMPREPLY=($(compgen -W "$words" -- "$2")) || COMPREPLY=($(compgen -f -- "$2")) ;;
    esac
}}
complete -o filenames -F _qsa qsa
"""


def run(arguments: Sequence[str]) -> int:
    """Print the script of a shell."""
    from . import commands

    parser = command_parser(__name__, __doc__, examples=('eval "$(qsa completion bash)"',))
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args(arguments).shell
    known = {name: (first_line(module.__doc__), _options(module)) for name, module in commands().items()}
    print("\n".join(_fish(known)) if shell == "fish" else (ZSH if shell == "zsh" else "") + _bash(known))
    return OK


def _options(module: object) -> list[str]:
    """Return the options of a command, as its own help lists them, and the keys of a suite where it takes these."""
    text = _printed(module, "--help") if module.__name__ != __name__ else "  --help"  # type: ignore[attr-defined]
    if "--help-keys" in text:
        text += _printed(module, "--help-keys")
    # An option begins its line, or follows its short form.
    return sorted(set(re.findall(r"^ +(?:-\w(?: \w+)?, )?(--[\w.-]+)", text, re.MULTILINE)))


def _printed(module: object, option: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        module.run([option])  # type: ignore[attr-defined]
    return text.getvalue()


def _bash(known: Mapping[str, tuple[str, list[str]]]) -> str:
    cases = [f'        {name}) words="{" ".join(options)}" ;;' for name, (_, options) in known.items()]
    return BASH.format(cases="\n".join(cases), commands=" ".join(known)).rstrip()


def _fish(known: Mapping[str, tuple[str, list[str]]]) -> Iterator[str]:
    for name, (text, options) in known.items():
        what = text.replace("\\", "\\\\").replace("'", "\\'")
        yield f"complete -c qsa -f -n __fish_use_subcommand -a {name} -d '{what}'"
        for option in options:
            yield f"complete -c qsa -n '__fish_seen_subcommand_from {name}' -l {option.removeprefix('--')}"
