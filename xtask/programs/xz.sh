# Compresses $SCALE megabytes with two threads, and back.
set -eu
awk -v lines=$((SCALE * 16384)) 'BEGIN {
    x = 54321
    for (n = 0; n < lines; n++) {
        x = (x * 1103515245 + 12345) % 2147483648
        printf "%010d %s\n", x, substr("the quick brown fox jumps over the lazy dog and is gone", x % 30 + 1, 40)
    }
}' > "$DIR/text"
$RUN xz -T2 -6 --block-size=8MiB -c "$DIR/text" > "$DIR/text.xz"
cksum < "$DIR/text.xz"
$RUN xz -T2 -dc "$DIR/text.xz" | cmp - "$DIR/text"
echo "came back whole"
