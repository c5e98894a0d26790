# bash completion for ploop(8) and ploop-balloon(8); made by `ploop completion bash`.
_ploop() {
    local line IFS=$'\n' ask=("${COMP_WORDS[0]}" completion -- words)
    # The other name of ploop balloon.
    [[ ${COMP_WORDS[0]} != *ploop-balloon ]] || ask=("${COMP_WORDS[0]%-balloon}" completion -- words balloon)
    COMPREPLY=()
    for line in $("${ask[@]}" "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null); do
        case $line in
        :files) compopt -o default 2>/dev/null ;;
        :folders) compopt -o dirnames 2>/dev/null ;;
        *) COMPREPLY+=("$(printf %q "${line%%$'\t'*}")") ;;
        esac
    done
}
complete -F _ploop ploop ploop-balloon
