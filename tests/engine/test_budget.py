"""Where short prompts come, long ones get little of a step; nobody else gets less than before."""

from paged_world import World, expected_output, prompt_of, request

from cabochon.engine.budget import RATION_STEPS, Budget, Ration


def a_world(part_tokens: int | None = 24, **options: int) -> World:
    sizes = {"step_tokens": 64, "max_seqs": 16, "max_model_len": 300, "num_pages": 1600} | options
    return World(part_tokens=part_tokens, **sizes)  # type: ignore[arg-type]


def steps_until(world: World, name: str, most: int = 200) -> int:
    """Steps until its first token."""
    for step in range(1, most):
        world.step()
        if world.outputs[name]:
            return step
    raise AssertionError(f"{name} has no token")


def test_a_long_prompt_takes_little_of_a_step_where_short_ones_come() -> None:
    world = a_world()
    world.add(request("long", prompt_of(260), max_tokens=1))
    world.step()
    assert world.plans[-1].num_tokens == 64, "it has come alone"
    for i in range(3):
        world.add(request(f"short{i}", prompt_of(15, seed=i + 1), max_tokens=1 + 2 * (i == 2)))
    world.run()
    tokens = [plan.num_tokens for plan in world.plans][1:]
    assert tokens[0] == 45 + 12, "all of the short ones; the oldest has half of its part meanwhile"
    assert tokens[1:3] == [13, 13], "half of it beside a decode"
    assert tokens[3:] == [24] * 6 + [16]
    assert world.outputs["long"] == expected_output(prompt_of(260), 1)


def test_parts_go_to_the_oldest_and_to_one_at_a_time() -> None:
    world = a_world(16, step_tokens=32)
    world.scheduler._ration.hear(3)
    names = [f"long{i}" for i in range(5)]
    for i, name in enumerate(names):
        world.add(request(name, prompt_of(70, seed=i), max_tokens=1))
    assert [steps_until(world, name) for name in names] == [5, 4, 5, 4, 5]
    assert max(plan.num_tokens for plan in world.plans) == 16


def test_prompts_that_fit_a_step_are_not_rationed_whatever_is_left_of_it() -> None:
    steps = {}
    for part_tokens in (24, None):
        world = a_world(part_tokens)
        for i in range(9):
            world.add(request(f"decode{i}", prompt_of(3, seed=i), max_tokens=100, ignore_eos=True))
        world.step()
        for i in range(5):
            world.add(request(f"short{i}", prompt_of(60, seed=20 + i), max_tokens=1))
        steps[part_tokens] = steps_until(world, "short4")
    assert steps[24] == steps[None]


def test_what_the_cache_has_does_not_make_a_prompt_long() -> None:
    world = a_world(8, step_tokens=128)
    for i in range(3):
        world.add(request(f"first{i}", prompt_of(160, seed=i), max_tokens=1))
    world.run()
    world.scheduler._ration.hear(1)
    world.add(request("long", prompt_of(290, seed=9), max_tokens=1))
    world.step()
    for i in range(3):
        world.add(request(f"again{i}", [*prompt_of(160, seed=i), *prompt_of(9, seed=5)], max_tokens=1))
    world.step()
    assert all(world.outputs[f"again{i}"] for i in range(3))
    assert world.plans[-1].num_tokens == 3 * 9 + 4


def test_who_was_preempted_and_finds_its_pages_is_not_rationed() -> None:
    world = a_world(8, max_model_len=200)
    world.add(request("long", prompt_of(190), max_tokens=1))
    world.add(request("mine", prompt_of(60, seed=1), max_tokens=30, ignore_eos=True))
    while not world.outputs["mine"]:
        world.step()
    world.scheduler._preempt(world.scheduler._requests["mine"])
    before = len(world.outputs["mine"])
    world.add(request("new", prompt_of(10, seed=2), max_tokens=1))
    world.step()
    assert len(world.outputs["mine"]) == before + 1


def test_a_better_priority_takes_no_part_away() -> None:
    world = a_world()
    world.add(request("decode", prompt_of(3), max_tokens=200, ignore_eos=True))
    world.add(request("long", prompt_of(260, seed=1), max_tokens=1, priority=1))
    for i in range(60):
        world.add(request(f"urgent{i}", prompt_of(30, seed=2 + i), max_tokens=1))
        world.step()
        if world.outputs["long"]:
            break
    assert i < 260 / 12


def test_after_many_steps_without_short_prompts_a_long_one_gets_whole_steps() -> None:
    ration = Ration(64, 24)
    assert ration.next_step(0).part == 64
    ration.hear(65)
    assert ration.next_step(0).part == 64
    ration.hear(64)
    parts = [ration.next_step(num_decodes=i % 2).part for i in range(RATION_STEPS + 1)]
    assert parts == [24, 12] * (RATION_STEPS // 2) + [64]
    unlimited = Ration(64, None)
    unlimited.hear(1)
    assert unlimited.next_step(3) == Budget(61, 64)


def test_without_a_ration_a_long_prompt_may_have_all_that_is_left() -> None:
    budget = Ration(64, None).next_step(3)
    budget.take(20, is_long=False)
    assert budget.most(500, is_long=True) == budget.most(500, is_long=False) == 41
    assert budget.half().most(500, is_long=True) == 21
