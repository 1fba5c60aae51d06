# Builds and checks large dicts and lists, and forks workers that do the same.
set -eu
$RUN python3 - "$SCALE" <<'PY'
import hashlib, multiprocessing, sys

def work(seed, entries):
    table, x = {}, seed
    for n in range(entries):
        x = (x * 6364136223846793005 + 1442695040888963407) % 2**64
        table[x] = [n, str(x), (n, x)]
    digest = hashlib.sha256()
    for key in sorted(table):
        n, text, pair = table[key]
        assert pair == (n, key) and text == str(key)
        digest.update(text.encode())
    return digest.hexdigest()

entries = int(sys.argv[1]) * 3000
big = list(range(entries * 4))
print(work(1, entries))
with multiprocessing.Pool(2) as pool:
    for line in pool.starmap(work, [(seed, entries // 4) for seed in range(2, 6)]):
        print(line)
assert sum(big) == (len(big) - 1) * len(big) // 2
print(len(big))
PY
