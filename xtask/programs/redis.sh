# A server under load saves itself in the background, and a reload matches.
set -eu
sock="$DIR/redis.sock"
rm -f "$DIR/dump.rdb"
start() {
    "$@" redis-server --port 0 --unixsocket "$sock" --dir "$DIR" --save "" --enable-debug-command yes \
        --dbfilename dump.rdb >> "$DIR/log" 2>&1 &
    server=$!
    n=0
    until redis-cli -s "$sock" PING 2> /dev/null | grep -q PONG; do
        n=$((n + 1))
        if [ $n -gt 600 ] || ! kill -0 $server 2> /dev/null; then
            cat "$DIR/log"
            exit 1
        fi
        sleep 0.1
    done
}
cli() { redis-cli -s "$sock" "$@"; }
stop() {
    cli SHUTDOWN NOSAVE > /dev/null 2>&1 || true
    if wait $server; then echo "stopped"; else echo "server ended with $?"; fi
}
start $RUN
cli DEBUG POPULATE $((SCALE * 1500)) key 400 > /dev/null
redis-benchmark -s "$sock" -q -n 5000 -c 8 -r 10000 -t set,get,lpush > /dev/null
before=$(cli DEBUG DIGEST)
cli BGSAVE > /dev/null
# The server goes on while the child saves: reads only, so that the digest stays.
redis-benchmark -s "$sock" -q -n 2000 -c 4 -r 10000 -t get > /dev/null
n=0
while cli INFO persistence | grep -q 'rdb_bgsave_in_progress:1'; do
    n=$((n + 1))
    [ $n -lt 1200 ] || { echo "the background save hangs"; exit 1; }
    sleep 0.1
done
cli INFO persistence | grep 'rdb_last_bgsave_status' | tr -d '\r'
[ "$(cli DEBUG DIGEST)" = "$before" ] && echo "unchanged by the save"
stop
start $RUN
[ "$(cli DEBUG DIGEST)" = "$before" ] && echo "the reload matches"
stop
