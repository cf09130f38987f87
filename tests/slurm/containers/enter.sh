#!/usr/bin/env bash
# enter.sh IMAGE MOUNTS FOLDER COMMAND...: run the command as in a container made from IMAGE, a virtual environment.
#
# As with a real image, PATH and PYTHONPATH are the image's, whatever the job has: its Python is the only one in reach,
# and nothing is found in the checkout's .venv. FOLDER must be mounted, or the command could not see it.
set -euo pipefail
image=$1 mounts=$2 folder=$3
shift 3
[[ ,$mounts, == *",$folder:$folder,"* ]] || { echo "enter.sh: $folder is not mounted ($mounts)" >&2; exit 255; }
unset VIRTUAL_ENV PYTHONHOME
export PATH=$image/bin:/usr/bin:/bin PYTHONPATH=$image/opt IN_CONTAINER=$image
cd "$folder"
exec "$@"
