"""From the teacher's weights to the student's: nothing lost, nothing scrambled, the teacher untouched."""

import pytest
import torch
import transformers
from packaging.version import Version
from teachers import LAYERS, base_prefix, tiny_teacher

from hf_fwp.conversion.calibrate import attention_heads
from hf_fwp.conversion.families import WEIGHT_MAPS, account, copy_teacher
from hf_fwp.conversion.stream import Walk, logits
from hf_fwp.hosts import HOSTS

DROPPED = {"sinks"}  # parameters of an attention that no mixer has


def test_with_no_layer_converted_the_logits_are_the_teachers(teacher, tokens):
    student = copy_teacher(teacher, layers=[])
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)
    assert student.hf_fwp_layers == {}


def test_every_weight_of_the_teacher_arrives(name, teacher):
    student = copy_teacher(teacher, layers=[0, 2])
    theirs, ours = teacher.state_dict(), student.state_dict()
    places = account(theirs, host=HOSTS[name], layers=[0, 2])
    assert set(places) == set(theirs)
    blocks = base_prefix(teacher)[1]
    mixers = tuple(f"{blocks}{index}.{HOSTS[name].attention}." for index in (0, 2))
    taken = set()
    for key, found in places.items():
        taken |= set(found)
        if not found:
            assert key.rpartition(".")[2] in DROPPED
        elif not key.startswith(mixers):
            assert found == (key,)
            assert torch.equal(ours[key], theirs[key]), key
        elif "norm" not in key:  # all its numbers, in whatever order; norms may be stored as the distance from 1
            arrived = torch.cat([ours[place].flatten() for place in found])
            assert torch.equal(arrived.sort().values, theirs[key].flatten().sort().values), key
    new = set(ours) - taken
    assert new
    assert all(key.startswith(mixers) for key in new)


def with_softmax(student, teacher, tokens):
    """Logits of the student whose mixers' own projections go through the teacher's softmax."""
    ours, theirs = Walk(student, tokens), Walk(teacher, tokens)
    for layer, mixer in sorted(student.hf_fwp_layers.items()):
        heads = attention_heads(mixer, ours.inputs(layer), ours.rotary(layer), softmax=theirs.softmax(layer))
        ours.advance(layer, mixer.o_proj(heads.out.flatten(2)))
    return torch.stack([logits(student, row) for row in ours.finish(LAYERS, ours.hidden_NTD)])


@torch.no_grad()
def test_with_softmax_over_what_was_copied_the_logits_are_the_teachers(teacher, tokens):
    """Biases, head norms, grouping, rotation, scale, window, cap, linear bias and sinks included."""
    if teacher.config.model_type == "gemma2" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers 5.17 leaves the cap of gemma2's scores out of sdpa, which it takes by default")
    student = copy_teacher(teacher, layers=range(LAYERS))
    expected = teacher(tokens).logits
    torch.testing.assert_close(with_softmax(student, teacher, tokens), expected, rtol=1e-4, atol=1e-4)
    for mixer in student.hf_fwp_layers.values():
        mixer.k_proj.weight.copy_(mixer.k_proj.weight.roll(1, dims=0))
    assert (with_softmax(student, teacher, tokens) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("falcon", {"alibi": True}),
        ("falcon", {"new_decoder_architecture": False, "multi_query": True, "bias": False, "parallel_attn": False}),
        ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4, "alibi": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt_neox", {"attention_bias": False, "use_parallel_residual": True}),
        ("phi3", {"num_key_value_heads": 4, "sliding_window": 5}),
        ("cohere", {"use_qk_norm": False}),
        ("smollm3", {"attention_bias": True}),
        ("opt", {"enable_bias": False, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        ("gemma3_text", {"attention_bias": True}),
        ("granite", {"num_key_value_heads": 1}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ],
    ids=str,
)
@torch.no_grad()
def test_other_shapes_of_a_family_are_copied_as_well(name, changes, tokens):
    teacher = tiny_teacher(name, **changes)
    student = copy_teacher(teacher, layers=range(LAYERS))
    torch.testing.assert_close(with_softmax(student, teacher, tokens), teacher(tokens).logits, rtol=1e-4, atol=1e-4)


def test_linear_attention_without_rotation_is_computed_from_the_teachers_heads(tokens):
    """sum_j (q·k_j) v_j / sum_j q·k_j written out with the teacher's own projections."""
    teacher = tiny_teacher("llama")
    student = copy_teacher(
        teacher, layers=[1], fwp={"rule": "linear_attention", "feature_map": "relu", "rope_heads": "none"}
    )
    attention, mixer = teacher.model.layers[1].self_attn, student.hf_fwp_layers[1]
    x_BTD = torch.randn(2, 6, teacher.config.hidden_size)
    q, k, v = (getattr(attention, f"{letter}_proj")(x_BTD).unflatten(-1, (-1, 8)).transpose(1, 2) for letter in "qkv")
    k, v = (x.repeat_interleave(attention.num_key_value_groups, dim=1) for x in (k, v))
    scores = (q.relu() @ k.relu().transpose(2, 3)).tril()
    reads = scores @ v / scores.sum(-1, keepdim=True).clamp_min(1e-6)
    expected = attention.o_proj(reads.transpose(1, 2).flatten(2))
    positions = torch.arange(6)[None]
    rotary = student.model.rotary_emb(x_BTD, positions)
    given, _ = mixer(x_BTD, position_embeddings=rotary)
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-4)


def test_the_teacher_is_not_modified_and_shares_nothing_by_default(teacher):
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    config = teacher.config.to_dict()
    student = copy_teacher(teacher, layers=[0])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[key], tensor) for key, tensor in teacher.state_dict().items())
    assert teacher.config.to_dict() == config


def test_sharing_keeps_reused_weights_in_the_teachers_memory_but_never_a_mixers(teacher):
    student = copy_teacher(teacher, layers=[0], share=True)
    mixer = student.hf_fwp_layers[0]
    theirs = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    own = {parameter.data_ptr() for parameter in mixer.parameters()}
    assert not own & theirs
    rest = {parameter.data_ptr() for parameter in student.parameters()} - own
    assert rest <= theirs


def test_tied_embeddings_stay_tied(name):
    for tied in (True, False):
        student = copy_teacher(tiny_teacher(name, tie_word_embeddings=tied), layers=[0])
        same = student.get_output_embeddings().weight is student.get_input_embeddings().weight
        assert same is tied


def test_the_student_keeps_generation_settings_mode_dtype_and_attention(teacher):
    teacher.generation_config.max_new_tokens = 3
    teacher.set_attn_implementation("eager")
    student = copy_teacher(teacher.to(torch.bfloat16), layers=[0])
    assert student.generation_config.max_new_tokens == 3
    assert student.config._attn_implementation == teacher.config._attn_implementation
    assert teacher.config._attn_implementation == ("sdpa" if teacher.config.model_type == "falcon" else "eager")
    assert not student.training
    assert student.dtype == torch.bfloat16
    assert student.hf_fwp_layers[0].A_log.dtype == torch.float32


def test_several_time_scales_start_from_the_teachers_output_projection(teacher, tokens):
    student = copy_teacher(teacher, layers=[0], fwp={"time_scales": 2})
    o_proj, teachers = student.hf_fwp_layers[0].o_proj.weight, Walk(teacher, tokens).output_projection(0).weight
    assert torch.equal(o_proj[:, : teachers.shape[1]] + o_proj[:, teachers.shape[1] :], teachers)


def test_what_the_teacher_has_no_weights_for_starts_neutral(teacher, tokens):
    bare = copy_teacher(teacher, layers=[0, 2])
    dressed = copy_teacher(teacher, layers=[0, 2], fwp={"conv_size": 4, "output_gate": "sigmoid2", "value_skip": 2})
    names = [name for name, _ in bare.hf_fwp_layers[0].named_parameters()]
    with torch.no_grad():
        for index, mixer in bare.hf_fwp_layers.items():
            for parameter_name in names:
                mine = mixer.get_parameter(parameter_name)
                dressed.hf_fwp_layers[index].get_parameter(parameter_name).copy_(mine)
    torch.testing.assert_close(dressed(tokens).logits, bare(tokens).logits)


def test_a_sequence_classifier_is_copied_with_its_head(name, tokens):
    if "ForSequenceClassification" not in HOSTS[name].heads:
        pytest.skip("the family has no such head")
    teacher = tiny_teacher(name, "ForSequenceClassification")
    student = copy_teacher(teacher, layers=[])
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)


def test_a_key_that_the_map_does_not_name_is_refused(name):
    host = HOSTS[name]
    key = f"model.{host.blocks}.1.{host.attention}.spin"
    assert account([key], host=host, layers=[0]) == {key: (key,)}
    with pytest.raises(ValueError, match=r"does not say what to do with .*\.spin"):
        account([key], host=host, layers=[1])


def test_a_dropped_key_is_named_in_the_map():
    key = "model.layers.1.self_attn.rotary_emb.inv_freq"
    assert account([key], host=HOSTS["llama"], layers=[1]) == {key: ()}
    assert WEIGHT_MAPS[HOSTS["llama"].projections]["rotary_emb.inv_freq"] is None


def test_a_weight_without_a_place_is_refused(teacher):
    teacher.get_input_embeddings().register_parameter("extra", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match=r"\.extra has no place"):
        copy_teacher(teacher, layers=[0])


def test_a_missing_weight_is_refused(teacher):
    norm = base_prefix(teacher)[0] + HOSTS[teacher.config.model_type].last[0]
    del teacher.get_submodule(norm).weight
    with pytest.raises(ValueError, match=rf"no weights for the student's {norm}\.weight"):
        copy_teacher(teacher, layers=[0])


def test_heads_that_do_not_fit_are_refused():
    teacher = tiny_teacher("llama")
    with pytest.raises(ValueError, match=r"v_proj.*heads match the teacher's"):
        copy_teacher(teacher, layers=[0], fwp={"value_head_dim": 24})


def test_a_converted_model_is_no_teacher(teacher):
    student = copy_teacher(teacher, layers=[0])
    with pytest.raises(ValueError, match="converted model already"):
        copy_teacher(student, layers=[1])
