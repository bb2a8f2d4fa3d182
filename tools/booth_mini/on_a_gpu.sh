#!/usr/bin/env bash
# Trains all of booth-mini on one GPU, exports it into WORK/model and measures it. Again: goes on where it was.
#
#   tools/booth_mini/on_a_gpu.sh WORK
#   DEVICE=cpu WORKERS=0 POOL=64 tools/booth_mini/on_a_gpu.sh WORK --steps 5 --batch-size 4    # a rehearsal
#
# WORK/data is made by `python -m tools.booth_mini.data --out WORK/data`; where there is no network, WORK/data/downloads
# is all that has to be there.
set -euo pipefail
work=$1
shift
test -f "$work/data/subjects/police_car/subject.json" || python -m tools.booth_mini.data --out "$work/data"
python -m tools.booth_mini.train all --device "${DEVICE:-cuda}" --workers "${WORKERS:-$(nproc)}" --pool "${POOL:-100000}" \
    --data "$work/data" --out "$work/train" --from "${FROM:-lora_booth/assets/booth_mini}" --model "$work/model" "$@"
python -m tools.booth_mini.measure --data "$work/data" --model "$work/model" --out "$work/figures.json" \
    --sheet "$work/contact_sheet.png"
