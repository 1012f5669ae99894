# Of libFuzzer's merge control file: the files that together cover most, `most` at most, best first.
NR == 1 { files = $1; next }
NR == 2 { next }
NR <= files + 2 { path[NR - 3] = $0; next }
$1 == "FT" {
    edges[$2] = $0
    sub(/^FT [0-9]+ ?/, "", edges[$2])
}
END {
    for (n = 0; n < most; n++) {
        best = -1
        gain = 0
        for (f in edges) {
            new = 0
            count = split(edges[f], list, " ")
            for (i = 1; i <= count; i++) if (!(list[i] in covered)) new++
            if (new > gain || (new == gain && new > 0 && f + 0 < best + 0)) { gain = new; best = f }
        }
        if (best == -1) break
        print path[best]
        count = split(edges[best], list, " ")
        for (i = 1; i <= count; i++) covered[list[i]]
        delete edges[best]
    }
}
