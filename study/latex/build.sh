#!/bin/sh
# Make study/latex/build/report.pdf from the logs of one scale's runs: build.sh [cpu|smoke|...]
#
# Needs LaTeX; on Debian and Ubuntu: apt-get install texlive-latex-recommended texlive-publishers \
#     texlive-fonts-recommended latexmk
# PYTHON names the interpreter [python], RESULTS where the scales' runs lie [results].
# Fails where a number is typed by hand, a key is unknown or its value has changed, a reference is
# undefined, a line sticks out, or the report has more than eight pages. Of another scale than the
# text's it names what is missing, and goes on.
set -eu
cd "$(dirname "$0")"
scale=${1:-cpu} python=${PYTHON:-python}

if ! command -v pdflatex >/dev/null || ! command -v latexmk >/dev/null; then
    echo "build.sh: LaTeX is missing: apt-get install texlive-latex-recommended" \
        "texlive-publishers texlive-fonts-recommended latexmk" >&2
    exit 2
fi
(cd ../.. && $python train.py report --scale "$scale" --results "${RESULTS:-results}")
$python check.py text ./*.tex
$python check.py numbers ./*.tex
mkdir -p build
export max_print_line=1000 # LaTeX breaks no message
latexmk -pdf -outdir=build -interaction=nonstopmode -halt-on-error -file-line-error \
    report.tex >build/latexmk.out 2>&1 || {
    grep -E -A3 '^(!|.*:[0-9]+: )' build/report.log | head -20 >&2
    exit 1
}
$python check.py log build/report.log
echo "study/latex/build/report.pdf"
