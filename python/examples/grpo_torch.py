"""GRPO with torch, as small as it goes: a policy that learns to say 7, and two rollout processes that generate with
its last version.

A rollout samples answers of the policy that it has and rewards them; the trainer takes the samples, makes a step by
their advantages within each group, and sends the new weights to both. Needs torch.
"""

import json
import multiprocessing

import torch

import ckpt_engine

CONFIG = {"backend": "ipc", "timeout_seconds": 30}
ROLLOUTS, STEPS, SAMPLES, ANSWERS, WANTED, RATE = 2, 60, 64, 10, 7, 0.5


def policy() -> torch.nn.Module:
    """Logits of the answers to a prompt of four numbers."""
    return torch.nn.Linear(4, ANSWERS)


def rollout(address: str, token: bytes, seed: int) -> None:
    """Generates with every version that arrives, and says what came of it."""
    torch.manual_seed(seed)
    control = ckpt_engine.ControlPlane.join(address, token)
    engine = ckpt_engine.form_group(control, CONFIG, world_size=1 + ROLLOUTS)
    samples, model = control.channel(), policy()
    parameters = dict(model.named_parameters())
    for step in range(STEPS):
        with engine.receive_weights(step, framework="torch") as weights, torch.no_grad():
            for name, tensor in weights:
                parameters[name].copy_(tensor)
        # Only now is the version active, on all ranks.
        with torch.no_grad():
            prompt = torch.randn(4)
            answers = torch.distributions.Categorical(logits=model(prompt)).sample((SAMPLES,))
        rewards = (answers == WANTED).float() - 0.1 * (answers - WANTED).abs()
        group = {"prompt": prompt.tolist(), "answers": answers.tolist(), "rewards": rewards.tolist()}
        samples.send(0, json.dumps(group).encode())
    engine.finalize()
    control.close()


def main() -> None:
    torch.manual_seed(0)
    token = ckpt_engine.generate_token()
    control = ckpt_engine.ControlPlane.lead("127.0.0.1:0", token)
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=rollout, args=(control.address, token, seed)) for seed in range(ROLLOUTS)
    ]
    for process in processes:
        process.start()
    engine = ckpt_engine.form_group(control, CONFIG, world_size=1 + ROLLOUTS)
    samples, model = control.channel(), policy()
    mean = 0.0
    for step in range(STEPS):
        report = engine.send_weights(model.named_parameters(), step)
        means = []
        for _ in range(ROLLOUTS):
            message = samples.recv(30)
            assert message is not None, "a rollout says nothing"
            group = json.loads(message[1])
            rewards = torch.tensor(group["rewards"])
            # GRPO: an answer counts by how much better it is than the others of its group.
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            # The gradient of the advantages' sum over the answers' log-likelihoods, written out.
            prompt, answers = torch.tensor(group["prompt"]), torch.tensor(group["answers"])
            with torch.no_grad():
                better = torch.nn.functional.one_hot(answers, ANSWERS) - model(prompt).softmax(0)
                gradient = -(advantages[:, None] * better).mean(0)
                model.weight -= RATE * torch.outer(gradient, prompt)
                model.bias -= RATE * gradient
            means.append(rewards.mean().item())
        mean = sum(means) / len(means)
        if step % 20 == 19:
            print(f"step {step + 1}: reward {mean:.2f}, update in {report.elapsed * 1e3:.1f} ms")
    engine.finalize()
    for process in processes:
        process.join()
    control.close()
    assert mean > 0.5, f"it has not learned: {mean}"


if __name__ == "__main__":
    main()
