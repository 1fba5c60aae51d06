# Sorts a text file with two threads. $SCALE megabytes; $RUN is what the program is run under.
set -eu
awk -v lines=$((SCALE * 16384)) 'BEGIN {
    x = 12345
    for (n = 0; n < lines; n++) {
        x = (x * 1103515245 + 12345) % 2147483648
        y = (x * 69069 + 1) % 2147483648
        printf "%010d %010d the quick brown fox jumps over the lazy\n", x, y
    }
}' > "$DIR/text"
$RUN sort --parallel=2 -S "$((SCALE * 2))M" "$DIR/text" | cksum
