"""Word problems that no pool trains on: GSM-symbolic (arXiv 2410.05229) as `reasoning-gym` writes it."""

SEED = 0  # of the questions, which are the same for every profile


def gsm_symbolic(items: int) -> list[dict]:
    """The first `items` questions, as a pool's rows have them; `solution` is the chain that the generator writes.

    Deviation: `reasoning-gym` ends each question with a sentence about the form of the answer. It is left out, because
    the system prompt says what form it shall have.
    """
    import reasoning_gym  # here, because it brings sympy, which the answers do without

    questions = reasoning_gym.create_dataset("gsm_symbolic", size=items, seed=SEED)
    return [
        {
            "id": f"gsm-symbolic-{number}",
            "prompt": question["question"].removesuffix(ENDING),
            "answer": question["answer"],
            "solution": question["metadata"]["answer_cot"],
            "task": "gsm_symbolic",
            "construction": 2,
        }
        for number, question in enumerate(questions)
    ]


ENDING = " Give the result as your final answer. Do not include units."
