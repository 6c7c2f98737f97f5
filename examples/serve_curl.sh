#!/bin/sh
# What a server can be asked with curl. Run: vattn serve --api-key secret, and in another terminal:
# VATTN_API_KEY=secret sh examples/serve_curl.sh [URL]
set -eu
url="${1:-http://127.0.0.1:8000}"
key="Authorization: Bearer ${VATTN_API_KEY:-none}"
json="Content-Type: application/json"
ask() { curl --silent --show-error --fail --header "$key" --header "$json" "$@"; echo; }

echo "== is it up"
curl --silent --show-error --fail "$url/health" && echo "yes"
ask "$url/v1/models"

echo "== a completion, and one as a stream"
ask "$url/v1/completions" --data '{"prompt": "A page is", "max_tokens": 8, "temperature": 0}'
ask --no-buffer "$url/v1/completions" \
    --data '{"prompt": "A page is", "max_tokens": 4, "temperature": 0, "stream": true}'

echo "== one of three words"
ask "$url/v1/completions" --data \
    '{"prompt": "It is", "structured_outputs": {"choice": ["live", "stale", "kept"]}}'

echo "== tokens"
ask "$url/tokenize" --data '{"prompt": "A page is"}'

echo "== memory, and a figure for Prometheus"
ask "$url/live/snapshot" | cut -c 1-200
curl --silent --fail "$url/metrics" | grep '^vattn:remaps_avoided_total' || true

if [ -n "${VATTN_API_KEY:-}" ]; then
    echo "== an order: needs a key"
    ask "$url/admin/memory" --data '{"budget": "64MiB"}'
fi
