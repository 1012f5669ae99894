# Of libFuzzer's merge control file: the files that together cover most, `most` at most, best first.
NR == 1 { files = $1; next }
NR == 2 { next }
NR <= files + 2 { path[NR - 3] = $0; next }
$1 == "FT" {
    # A file never covers more that is new than it did before, so most need no second look.
    bound[$2] = NF - 2
    edges[$2] = $0
    sub(/^FT [0-9]+ ?/, "", edges[$2])
}
END {
    for (n = 0; n < most; n++) {
        best = -1
        gain = 0
        for (f = 0; f < files; f++) {
            if (!(f in edges) || bound[f] <= gain) continue
            new = 0
            count = split(edges[f], list, " ")
            for (i = 1; i <= count; i++) if (!(list[i] in covered)) new++
            bound[f] = new
            if (new > gain) { gain = new; best = f }
        }
        if (best == -1) break
        print path[best]
        count = split(edges[best], list, " ")
        for (i = 1; i <= count; i++) covered[list[i]]
        delete edges[best]
    }
}
