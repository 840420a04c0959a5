"""Continue a few prompts on two ranks: python examples/offline.py"""

from pathlib import Path

from moespan import LLM, SamplingParams

MODEL = Path(__file__).parents[1] / "models" / "quickstart"


def main() -> None:
    greedy = SamplingParams(temperature=0, max_tokens=100)
    drawn = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=100)
    with LLM(str(MODEL), tensor_parallel_size=2) as llm:
        prompts = ["681+734=", "sort c y r a f w:", "Story: Mia, mouse, forest."]
        for output in llm.generate(prompts, [greedy, greedy, drawn]):
            print(output.prompt, output.outputs[0].text)


if __name__ == "__main__":
    main()
