"""Completion of commands, recipes, keys and files in a shell: bash, zsh and fish.

source <(sslvit completion bash)           in ~/.bashrc
source <(sslvit completion zsh)            in ~/.zshrc, after compinit if it calls that
sslvit completion fish | source            in ~/.config/fish/config.fish
"""

from ..errors import UserError, did_you_mean

SHELLS = ("bash", "zsh", "fish")
# bash splits `data.train=pho` into three words, and after the `=` only files are right.
BASH = """_sslvit() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} words="" i
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  elif [ "$cur" != = ] && [ "${{COMP_WORDS[COMP_CWORD-1]}}" != = ]; then
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  for i in "${{!COMPREPLY[@]}}"; do
    case "${{COMPREPLY[i]}}" in *=) compopt -o nospace 2> /dev/null ;; esac  # macOS has bash 3.2, which has no compopt
  done
}}
complete -o default -F _sslvit sslvit
"""
ZSH = """whence compdef > /dev/null || {{ autoload -Uz compinit && compinit }}
_sslvit() {{
  local -a found
  if (( CURRENT == 2 )); then
    compadd -- {commands}
  elif compset -P '*='; then
    _files
  else
    case $words[2] in
{cases}
    esac
    compadd -- ${{found:#*=}}
    compadd -S '' -- ${{(M)found:#*=}}
    _files
  fi
}}
compdef _sslvit sslvit
"""


def script(shell: str, words: dict[str, list[str]]) -> str:
    """What a shell reads. words: what may follow each command, keys with their `=`. Raises UserError."""
    if shell not in SHELLS:
        raise UserError(f"completion is for {', '.join(SHELLS)}: give one of them.{did_you_mean(shell, SHELLS)}")
    if shell == "fish":
        # Not __fish_seen_subcommand_from: a folder of images may be called `data`.
        lines = [f"complete -c sslvit -n __fish_use_subcommand -f -a '{' '.join(words)}'"]
        lines += [
            f"complete -c sslvit -n 'contains -- {command} (commandline -opc)[2]' -a '{' '.join(more)}'"
            for command, more in words.items()
        ]
        return "\n".join(lines)
    template, begin, end = (BASH, 'words="', '"') if shell == "bash" else (ZSH, "found=(", ")")
    cases = "\n".join(f"    {command}) {begin}{' '.join(more)}{end} ;;" for command, more in words.items())
    return template.format(commands=" ".join(words), cases=cases)
