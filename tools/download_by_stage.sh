#!/bin/sh
# Download the raw data sets of a stage to $DATA_ROOT/raw. It can be stopped and run again. Options are those of
# tools/download.py fetch.
#     tools/download_by_stage.sh stage1|stage2|stage3|all [--limit 1000] [--jobs 32] [--max-bytes 500GB] ...
set -eu
cd "$(dirname "$0")/.."
usage() { sed -n '2,4p' "$0" | cut -c3- >&2; exit 2; }
[ $# -ge 1 ] || usage
stage=$1
shift
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
case $stage in
    stage1) exec "$PYTHON" tools/download.py fetch --stage 1 "$@" ;;
    stage2) exec "$PYTHON" tools/download.py fetch --stage 2 "$@" ;;
    stage3)
      echo "stage 3 trains on the data of stage 2: nothing more is needed" \
        "(tools/download_by_stage.sh stage2 if you have not)" ;;
    all)
        status=0
        "$PYTHON" tools/download.py fetch --stage 1 "$@" || status=$?
        # A full disk, --max-bytes and an interrupt end the second stage, too.
        [ $status -le 1 ] || exit $status
        "$PYTHON" tools/download.py fetch --stage 2 "$@" || status=$?
        echo "stage 3 trains on the data of stage 2: nothing more is needed"
        exit $status
        ;;
    *) usage ;;
esac
