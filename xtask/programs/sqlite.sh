# Loads, indexes, queries and checks an in-memory database.
set -eu
$RUN sqlite3 :memory: <<SQL
PRAGMA cache_size = -1000000;
CREATE TABLE t(id INTEGER PRIMARY KEY, k TEXT, v TEXT);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < $SCALE * 4000)
INSERT INTO t SELECT i, printf('%08x', (i * 2654435761) % 4294967296), printf('%0150d', i * 7919) FROM n;
CREATE INDEX t_k ON t(k);
SELECT count(*), min(k), max(k), sum(length(v)) FROM t;
SELECT id, k FROM t WHERE k BETWEEN '40000000' AND '40001000' ORDER BY k;
DELETE FROM t WHERE id % 3 = 0;
UPDATE t SET v = v || k WHERE id % 5 = 0;
SELECT count(*), sum(length(v)) FROM t;
PRAGMA integrity_check;
SQL
