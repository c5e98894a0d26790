#compdef ploop ploop-balloon
# zsh completion for ploop(8) and ploop-balloon(8); made by `ploop completion zsh`.
_ploop() {
    local line word
    local -a described ask
    ask=(${(q)words[1]} completion -- words)
    # The other name of ploop balloon.
    [[ $words[1] != *ploop-balloon ]] || ask=(${(q)words[1]%-balloon} completion -- words balloon)
    for line in ${(f)"$(_call_program words $ask ${(q)words[2,CURRENT]})"}; do
        case $line in
        :files) _files ;;
        :folders) _files -/ ;;
        *)
            word=${line%%$'\t'*}
            described+=("${word//:/\\:}:${${line#$word}#$'\t'}")
            ;;
        esac
    done
    (( $#described )) && _describe ploop described
}
_ploop "$@"
