#compdef ploop
# zsh completion for ploop(8); made by `ploop completion zsh`.
_ploop() {
    local line word
    local -a described
    for line in ${(f)"$(_call_program words ${(q)words[1]} completion -- words ${(q)words[2,CURRENT]})"}; do
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
