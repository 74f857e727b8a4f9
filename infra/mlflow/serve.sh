#!/usr/bin/env bash
# Starts the MLflow server with password authentication. Everything comes from the environment:
#   MLFLOW_BACKEND_STORE_URI       database of runs and models, e.g. postgresql+psycopg://mlflow:...@postgres:5432/mlflow
#   MLFLOW_AUTH_DATABASE_URI       database of users and permissions (default: the same one; the tables do not collide)
#   MLFLOW_ARTIFACTS_DESTINATION   s3://bucket/prefix, or a folder; a bucket that holds nothing else
#   MLFLOW_AUTH_ADMIN_USERNAME, MLFLOW_AUTH_ADMIN_PASSWORD   the first user (password: 12 characters or more)
#   MLFLOW_FLASK_SERVER_SECRET_KEY   signs the forms
#   MLFLOW_ALLOWED_HOSTS           comma-separated Host headers that are answered
#   MLFLOW_HOST, MLFLOW_PORT, MLFLOW_WORKERS   default 0.0.0.0, 5000, 2
set -euo pipefail

for name in MLFLOW_BACKEND_STORE_URI MLFLOW_ARTIFACTS_DESTINATION MLFLOW_ALLOWED_HOSTS \
            MLFLOW_AUTH_ADMIN_USERNAME MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY; do
  if [[ -z ${!name:-} ]]; then
    echo "serve.sh: $name is not set" >&2
    exit 1
  fi
done

# The database address carries a password, so the file is private and written at start instead of kept in the image.
umask 077
users=${MLFLOW_AUTH_DATABASE_URI:-$MLFLOW_BACKEND_STORE_URI}
folder=$(mktemp -d)
export MLFLOW_AUTH_CONFIG_PATH=$folder/auth.ini
cat > "$MLFLOW_AUTH_CONFIG_PATH" <<INI
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = ${users//%/%%}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI

# The server's own background jobs run code that clients name; nothing here needs them.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false

exec mlflow server \
  --app-name basic-auth \
  --backend-store-uri "$MLFLOW_BACKEND_STORE_URI" \
  --artifacts-destination "$MLFLOW_ARTIFACTS_DESTINATION" \
  --serve-artifacts \
  --allowed-hosts "$MLFLOW_ALLOWED_HOSTS" \
  --host "${MLFLOW_HOST:-0.0.0.0}" \
  --port "${MLFLOW_PORT:-5000}" \
  --workers "${MLFLOW_WORKERS:-2}"
