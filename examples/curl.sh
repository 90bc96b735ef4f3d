#!/usr/bin/env bash
# The API with nothing but curl. The address is in BATON_URL (default http://127.0.0.1:8000).
set -euo pipefail
url=${BATON_URL:-http://127.0.0.1:8000}
post() { curl --silent --show-error --no-buffer "$url$1" -H 'Content-Type: application/json' --data "$2"; echo; }

echo "# models"
curl --silent --show-error "$url/v1/models"; echo
model=$(curl --silent "$url/v1/models" | sed 's/.*"id": *"\([^"]*\)".*/\1/')

echo "# a chat, streamed"
post /v1/chat/completions '{"model": "'"$model"'", "stream": true, "max_tokens": 20,
  "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the sea?"}]}'

echo "# a completion, whole, the same each time"
post /v1/completions '{"model": "'"$model"'", "prompt": "The sea is", "max_tokens": 20, "temperature": 1, "seed": 7}'

echo "# an error: OpenAI's shape, and the parameter's name"
post /v1/completions '{"model": "'"$model"'", "prompt": "The sea is", "max_tokens": 0}'
