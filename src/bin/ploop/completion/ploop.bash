# bash completion for ploop(8); made by `ploop completion bash`.
_ploop() {
    local line IFS=$'\n'
    COMPREPLY=()
    for line in $("${COMP_WORDS[0]}" completion -- words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null); do
        case $line in
        :files) compopt -o default 2>/dev/null ;;
        :folders) compopt -o dirnames 2>/dev/null ;;
        *) COMPREPLY+=("$(printf %q "${line%%$'\t'*}")") ;;
        esac
    done
}
complete -F _ploop ploop
