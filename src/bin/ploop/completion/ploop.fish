# fish completion for ploop(8) and ploop-balloon(8); made by `ploop completion fish`.
function __ploop_words
    set -l words (commandline -opc) (commandline -ct)
    # The other name of ploop balloon.
    set -l program (string replace -r -- '-balloon$' '' $words[1])
    for line in ($program completion -- words $argv $words[2..-1] 2>/dev/null)
        switch $line
            case :files
                __fish_complete_path (commandline -ct)
            case :folders
                __fish_complete_directories (commandline -ct)
            case '*'
                echo $line
        end
    end
end
complete -c ploop -f -a '(__ploop_words)'
complete -c ploop-balloon -f -a '(__ploop_words balloon)'
