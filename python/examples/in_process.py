"""The smallest use: a trainer and a rollout in one process, on one event loop. Needs nothing but the package."""

import asyncio

import ckpt_engine


async def main() -> None:
    trainer, (rollout,) = ckpt_engine.form_local_group({"backend": "naive"})
    for step in (1, 2):
        # Any iterable of (name, tensor): of torch, numpy, jax, or bytes with a type and a shape.
        weights = [
            (f"layers.{i}.weight", ckpt_engine.Tensor(bytes([step] * 32), "bfloat16", (4, 4)))
            for i in range(3)
        ]

        async def receive() -> ckpt_engine.ReceiveReport:
            async with await rollout.receive_weights_async(step) as received:
                async for name, tensor in received:
                    assert tensor.tobytes() == bytes([step] * 32), name
            return received.report

        sent, received = await asyncio.gather(trainer.send_weights_async(weights, step), receive())
        print(f"version {sent.version}: {received.tensors} tensors, {received.state}")
    await trainer.finalize_async()
    await rollout.finalize_async()


asyncio.run(main())
