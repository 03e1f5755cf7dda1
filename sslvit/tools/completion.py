"""Completion of commands and keys in a shell: bash, zsh and fish.

source <(sslvit completion bash)           in ~/.bashrc
source <(sslvit completion zsh)            in ~/.zshrc, after compinit
sslvit completion fish | source            in ~/.config/fish/config.fish
"""

from ..errors import UserError, did_you_mean

SHELLS = ("bash", "zsh", "fish")
BASH = """_sslvit() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$cur"))
    COMPREPLY=("${{COMPREPLY[@]/%/ }}")
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o nospace -o default -F _sslvit sslvit
"""


def script(shell: str, words: dict[str, list[str]]) -> str:
    """What a shell reads. words: of each command, keys with their `=`. Raises UserError."""
    if shell not in SHELLS:
        raise UserError(f"completion is for {', '.join(SHELLS)}: give one of them.{did_you_mean(shell, SHELLS)}")
    if shell == "fish":
        lines = [f"complete -c sslvit -n __fish_use_subcommand -f -a '{' '.join(words)}'"]
        lines += [
            f"complete -c sslvit -n '__fish_seen_subcommand_from {k}' -a '{' '.join(v)}'" for k, v in words.items()
        ]
        return "\n".join(lines)
    cases = "\n".join(f'    {command}) words="{" ".join(keys)}" ;;' for command, keys in words.items())
    zsh = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return zsh + BASH.format(commands=" ".join(words), cases=cases)
