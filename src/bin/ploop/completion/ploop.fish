# fish completion for ploop(8); made by `ploop completion fish`.
function __ploop_words
    set -l words (commandline -opc) (commandline -ct)
    for line in ($words[1] completion -- words $words[2..-1] 2>/dev/null)
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
