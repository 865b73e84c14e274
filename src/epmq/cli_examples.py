"""What one would really type, command by command."""

EXAMPLES = """
epmq run my.yaml --dry-run
epmq run my.yaml
epmq run my.yaml -s quantize.bits=3 -s quantize.group_size=64 -o merged-3bit
epmq merge my.yaml -o merged
epmq merge my.yaml -s merge.method=ties -o merged-ties
epmq merge my.yaml -s merge.scaling=0.5 -o merged-05 --quiet
epmq quantize my.yaml
epmq quantize my.yaml -s quantize.method=gptq -o merged-gptq
epmq quantize my.yaml -s quantize.size=40MB -o merged-40mb
epmq eval merged-4bit my.yaml
epmq eval merged-4bit my.yaml --experts
epmq eval merged-4bit my.yaml --experts --json > experts.json
epmq compare my.yaml
epmq compare my.yaml -o my-comparison
epmq compare my.yaml -s quantize.bits=2 -s quantize.group_size=32 -o compared-2bit
epmq export merged-4bit --to onnx
epmq export merged-4bit --to gguf -o merged-gguf
epmq export merged-4bit --to vllm
epmq bench merged-4bit
epmq bench merged-4bit --threads 4
epmq page merged-4bit
epmq page merged-4bit -o page --quiet
epmq page merged-4bit-onnx
epmq inspect merged-4bit
epmq inspect merged-4bit --layers
epmq inspect models/base
epmq report merged-4bit merged-gptq
epmq report merged-4bit merged-3bit -o compared.html
epmq report merged-4bit merged-gptq --experts experts.json --title 'Two methods'
epmq init my.yaml
epmq init first-try.yaml
epmq init recipes/decoders.yaml
epmq reproduce --list
epmq reproduce clip-vit-b32-8 --dry-run
epmq reproduce clip-vit-b32-8 --merge ties --bits 4 --limit 64
epmq demo --fetch-only
epmq demo
epmq demo -o my-demo
"""


def examples(command: str) -> str:
    """The epilog of a command."""
    lines = (f"  [cyan]{line}[/cyan]" for line in EXAMPLES.splitlines() if line.split()[1:2] == [command])
    return "\n\n".join(["[bold]Examples[/bold]", *lines])
