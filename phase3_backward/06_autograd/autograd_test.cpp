#include "autograd.hpp"

#include <cmath>
#include <random>

#include "common/testing/allocations.hpp"
#include "common/testing/suite.hpp"
#include "copy_task.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

const Axes ELEMENT = {"batch", "head", "row", "channel"};
const Axes WEIGHT = {"feature", "channel"};
const char* const NAMES[] = {"q", "k", "v"};

// ---- Stories: what happens to an AttentionFunction and to the variables that it has seen ----------------------------

enum class Between {
  nothing,
  inputs_overwritten,
  output_overwritten,
  another_forward_before,
  another_backward_between
};
enum class Loss { random, sum, tokens };  // dO: any numbers; 1 everywhere, expanded; laid out as [B, S, H, D]

struct Story {
  const char* why;
  std::array<bool, 3> needs = {true, true, true};
  std::array<int, 3> roles = {0, 1, 2};  // which variable is q, k, v: {0, 0, 0} is one variable three times
  Between between = Between::nothing;
  int times = 1;              // calls of backward()
  bool had_gradient = false;  // the variables come with a gradient of an earlier pass
  Loss loss = Loss::random;
  AttentionOptions options = {};
  Index queries = 3;
  Index keys = 4;
  Index value_width = 2;
  Index heads = 2;
};

// Their numbers never change: new ones go to the end.
const std::vector<Story>& stories() {
  static const std::vector<Story> list = {
      {.why = "forward, backward"},
      {.why = "causal, more keys than queries", .options = {.causal = true}, .keys = 6},
      {.why = "causal, fewer keys than queries", .options = {.causal = true}, .queries = 5},
      {.why = "a scale of 0.3", .options = {.scale = 0.3}},
      {.why = "a negative scale, causal", .options = {.causal = true, .scale = -1.5}},
      {.why = "values wider than queries", .value_width = 7},
      {.why = "dO laid out by tokens", .loss = Loss::tokens},
      {.why = "the loss is the sum of the output: dO has strides of 0", .loss = Loss::sum},
      {.why = "q, k and v are overwritten before backward()", .between = Between::inputs_overwritten},
      {.why = "the output is overwritten before backward()", .between = Between::output_overwritten},
      {.why = "an earlier forward() of other variables", .between = Between::another_forward_before},
      {.why = "backward() twice", .times = 2},
      {.why = "backward() three times, with another function's in between",
       .between = Between::another_backward_between,
       .times = 3},
      {.why = "the variables have gradients already", .had_gradient = true},
      {.why = "only q needs a gradient", .needs = {true, false, false}},
      {.why = "only k needs a gradient", .needs = {false, true, false}},
      {.why = "only v needs a gradient", .needs = {false, false, true}},
      {.why = "q is frozen", .needs = {false, true, true}},
      {.why = "k is frozen, and all have gradients already", .needs = {true, false, true}, .had_gradient = true},
      {.why = "v is frozen, and backward() twice", .needs = {true, true, false}, .times = 2},
      {.why = "one variable is q, k and v", .roles = {0, 0, 0}, .queries = 4, .value_width = 5},
      {.why = "one variable is k and v", .roles = {0, 1, 1}, .value_width = 5},
      {.why = "one variable is q and k, causal", .roles = {0, 0, 2}, .options = {.causal = true}, .queries = 4},
      {.why = "one variable is q and v, with a gradient already",
       .roles = {0, 1, 0},
       .had_gradient = true,
       .queries = 4,
       .value_width = 5},
      {.why = "one head, one query", .queries = 1, .heads = 1},
      {.why = "nothing is saved of frozen variables, but another forward() was before",
       .needs = {false, true, false},
       .between = Between::another_forward_before},
  };
  return list;
}

template <typename Scalar>
SharedVariable<Scalar> variable(const Shape<4>& shape, unsigned seed, bool needs_gradient = true) {
  const Tensor<float, 4> numbers = normal(shape, seed);
  Tensor<Scalar, 4> value(shape);
  std::copy_n(numbers.data(), numbers.count(), value.data());
  return std::make_shared<Variable<Scalar>>(Variable<Scalar>{std::move(value), needs_gradient});
}

constexpr Index WIDTH = 5;

struct Played {
  std::array<SharedVariable<double>, 3> variables;  // by role: the same pointer may stand more than once
  Tensor<double, 4> output;
};

std::array<SharedVariable<double>, 3> variables_of(const Story& story, unsigned seed) {
  std::array<SharedVariable<double>, 3> result;
  for (std::size_t role = 0; role < 3; ++role) {
    const auto who = static_cast<std::size_t>(story.roles[role]);
    if (who < role) {
      result[role] = result[who];
      continue;
    }
    const Index width = role == 2 ? story.value_width : WIDTH;
    const Shape<4> shape{2, story.heads, role == 0 ? story.queries : story.keys, width};
    result[role] = variable<double>(shape, seed + static_cast<unsigned>(role), story.needs[role]);
    if (story.had_gradient) result[role]->gradient = std::move(variable<double>(shape, seed + 10)->value);
  }
  return result;
}

// dO, and the memory that it looks at.
struct OutputGradient {
  Tensor<double, 4> memory;
  View<const double, 4> view;
};

OutputGradient output_gradient(const Story& story, unsigned seed) {
  const auto [batch, heads, rows, width] = Shape<4>{2, story.heads, story.queries, story.value_width};
  if (story.loss == Loss::sum) {
    Tensor<double, 4> ones({1, 1, 1, width});
    std::fill_n(ones.data(), width, 1.0);
    const View<const double, 4> view(ones.data(), {batch, heads, rows, width}, {0, 0, 0, 1});
    return {std::move(ones), view};
  }
  Tensor<double, 4> memory = std::move(variable<double>({batch, heads, rows, width}, seed)->value);
  const Shape<4> strides =
      story.loss == Loss::tokens ? Shape<4>{rows * heads * width, width, heads * width, 1} : memory.view().strides();
  const View<const double, 4> view(memory.data(), {batch, heads, rows, width}, strides);
  return {std::move(memory), view};
}

void overwrite(Tensor<double, 4>& tensor) { std::fill_n(tensor.data(), tensor.count(), 3.0); }

Played play(const Story& story) {
  const auto variables = variables_of(story, 1);
  const OutputGradient d_output = output_gradient(story, 7);
  AttentionFunction<double> attention(story.options);
  AttentionFunction<double> another(story.options);
  if (story.between == Between::another_forward_before) {
    const auto others = variables_of({.why = "", .queries = 2, .keys = 7}, 30);
    attention.forward(others[0], others[1], others[2]);
  }
  Tensor<double, 4> output = attention.forward(variables[0], variables[1], variables[2]);
  Tensor<double, 4> kept(output.shape());
  std::copy_n(output.data(), output.count(), kept.data());

  if (story.between == Between::inputs_overwritten) {
    for (const auto& each : variables) overwrite(each->value);
  }
  if (story.between == Between::output_overwritten) overwrite(output);
  for (int time = 0; time < story.times; ++time) {
    attention.backward(d_output.view);
    if (story.between == Between::another_backward_between) {
      const auto others = variables_of({.why = "", .queries = 2, .keys = 7}, 30);
      another.forward(others[0], others[1], others[2]);
      another.backward(output_gradient({.why = "", .queries = 2}, 31).view);
    }
  }
  return {variables, std::move(kept)};
}

// The gradient that variable `who` should have in the end: a sum over its roles, its calls, and what it had. None if it
// needs none and had none.
std::optional<Array> wanted_gradient(const Story& story, std::size_t who) {
  const auto leaves = variables_of(story, 1);
  const OutputGradient d_output = output_gradient(story, 7);
  const auto result = engine::forward(leaves[0]->value, leaves[1]->value, leaves[2]->value, story.options);
  const auto gradients = engine::backward(leaves[0]->value, leaves[1]->value, leaves[2]->value, result.output,
                                          result.lse, d_output.view, story.options);
  const Array of_role[] = {to_array(gradients.query), to_array(gradients.key), to_array(gradients.value)};

  Array sum = of_role[who];
  std::fill(sum.values.begin(), sum.values.end(), 0.0);
  if (leaves[who]->gradient) sum = to_array(*leaves[who]->gradient);
  if (!leaves[who]->needs_gradient) return leaves[who]->gradient ? std::optional(sum) : std::nullopt;
  for (std::size_t role = 0; role < 3; ++role) {
    if (leaves[role] != leaves[who]) continue;
    for (std::size_t at = 0; at < sum.count(); ++at) sum.values[at] += story.times * of_role[role].values[at];
  }
  return sum;
}

// 1e-10 of the largest element: double, added up in whatever order.
Bound double_bound(const Array& want) {
  double largest = 1.0;
  for (const double value : want.values) largest = std::max(largest, std::abs(value));
  return {1e-10, {want.shape, std::vector<double>(want.count(), largest)}};
}

bool expect_gradient(const std::string& name, const std::optional<Tensor<double, 4>>& got,
                     const std::optional<Array>& want) {
  if (!want) return expect(!got.has_value(), name, "has a gradient that nobody asked for");
  if (!expect(got.has_value(), name, "has no gradient, but needs one")) return false;
  return expect_close(name, to_array(*got), *want, double_bound(*want), ELEMENT);
}

void check_story(const Story& story) {
  const Played played = play(story);
  for (std::size_t role = 0; role < 3; ++role) {
    const std::string name = std::string("gradient of ") + NAMES[role];
    if (!expect_gradient(name, played.variables[role]->gradient, wanted_gradient(story, role))) return;
  }
}

void for_each(const std::function<bool(const Story&)>& fits) {
  int number = 0;
  for (const Story& story : stories()) {
    ++number;
    if (fits(story)) run_case(number, story.why, [&] { check_story(story); });
  }
}

// ---- The copy task --------------------------------------------------------------------------------------------------

CopyTask copy_task(Index sequences, Index length, Index symbols, unsigned seed) {
  std::mt19937 random(seed);
  CopyTask task{sequences, length, symbols, {}};
  for (Index n = 0; n < sequences * length; ++n) {
    task.tokens.push_back(static_cast<int>(random() % static_cast<unsigned>(symbols)));
  }
  return task;
}

CopyLayer copy_layer(const CopyTask& task, Index width, float size) {
  const auto matrix = [&](unsigned seed) {
    const Tensor<float, 4> numbers = normal({1, 1, task.embedding(), width}, seed);
    return Matrix(as_matrix(numbers.view()[0][0]) * size);
  };
  return {matrix(41), matrix(42)};
}

using MatrixXd = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// What the layer says of sequence b, [S, N], in double, written as the header says it.
MatrixXd probabilities_of(const CopyTask& task, Index b, const MatrixXd& query_weights, const MatrixXd& key_weights) {
  const MatrixXd x = task.embedded(b).cast<double>();
  const MatrixXd scores =
      x * query_weights * (x * key_weights).transpose() / std::sqrt(static_cast<double>(query_weights.cols()));
  MatrixXd result = MatrixXd::Zero(task.length, task.symbols);
  for (Index i = 0; i < task.length; ++i) {
    const Eigen::ArrayXd weights = scores.row(i).head(i + 1).array().exp();
    for (Index j = 0; j <= i; ++j) result(i, task.token(b, j)) += weights(j) / weights.sum();
  }
  return result;
}

double loss_of(const CopyTask& task, const MatrixXd& query_weights, const MatrixXd& key_weights) {
  double sum = 0.0;
  for (Index b = 0; b < task.sequences; ++b) {
    const MatrixXd probabilities = probabilities_of(task, b, query_weights, key_weights);
    for (Index i = 1; i < task.length; ++i) sum -= std::log(probabilities(i, task.token(b, i - 1)));
  }
  return sum / static_cast<double>(task.sequences * (task.length - 1));
}

// d loss / d weights by difference quotients in double; `query` chooses which of the two.
Array gradient_of(const CopyTask& task, const CopyLayer& layer, bool query) {
  const double step = 1e-5;
  MatrixXd weights[] = {layer.query_weights.cast<double>(), layer.key_weights.cast<double>()};
  MatrixXd& moved = weights[query ? 0 : 1];
  Array result{{moved.rows(), moved.cols()}, {}};
  for (Index row = 0; row < moved.rows(); ++row) {
    for (Index column = 0; column < moved.cols(); ++column) {
      const double before = moved(row, column);
      moved(row, column) = before + step;
      const double up = loss_of(task, weights[0], weights[1]);
      moved(row, column) = before - step;
      const double down = loss_of(task, weights[0], weights[1]);
      moved(row, column) = before;
      result.values.push_back((up - down) / (2 * step));
    }
  }
  return result;
}

// One step must take the weights where gradient descent in double would.
bool expect_step(const CopyTask& task, const CopyLayer& before, const CopyLayer& after, float rate) {
  for (const bool query : {true, false}) {
    const Array gradient = gradient_of(task, before, query);
    const Matrix& from = query ? before.query_weights : before.key_weights;
    const Matrix& to = query ? after.query_weights : after.key_weights;
    double largest = 0.0;
    for (const double value : gradient.values) largest = std::max(largest, std::abs(value));
    const Array got = to_array((from - to) / rate);
    const Bound bound{1e-4, {gradient.shape, std::vector<double>(gradient.count(), largest)}};
    if (!expect_close(query ? "step of query_weights" : "step of key_weights", got, gradient, bound, WEIGHT)) {
      return false;
    }
  }
  return true;
}

bool expect_about(std::string_view name, double got, double want, double tolerance, const std::string& meaning) {
  return expect(std::abs(got - want) <= tolerance, name,
                "got " + std::to_string(got) + ", want " + std::to_string(want) + ": " + meaning);
}

// At how many places, the first of each sequence left out, is the likeliest symbol that of the place before?
double share_right(const CopyTask& task, const Tensor<float, 3>& probabilities) {
  Index right = 0;
  for (Index b = 0; b < task.sequences; ++b) {
    for (Index i = 1; i < task.length; ++i) {
      const float* row = &probabilities(b, i, 0);
      if (std::max_element(row, row + task.symbols) - row == task.token(b, i - 1)) ++right;
    }
  }
  return static_cast<double>(right) / static_cast<double>(task.sequences * (task.length - 1));
}

// ---- What is recognised: every story, and the copy task as story 100 ------------------------------------------------

std::vector<int> all_numbers() {
  std::vector<int> result;
  for (int number = 1; number <= static_cast<int>(stories().size()); ++number) result.push_back(number);
  result.push_back(100);
  return result;
}

const Recognise recognise_autograd(all_numbers(), [](int number) -> std::vector<Array> {
  if (number == 100) {
    const CopyTask task = copy_task(2, 5, 3, 11);
    CopyLayer layer = copy_layer(task, 3, 0.5f);
    const float loss = train_step(task, layer, 1.0f);
    return {to_array(layer.query_weights), to_array(layer.key_weights), Array{{1}, {static_cast<double>(loss)}}};
  }
  const Story& story = stories().at(static_cast<std::size_t>(number) - 1);
  const Played played = play(story);
  std::vector<Array> gradients;
  for (std::size_t role = 0; role < 3; ++role) {
    const auto& gradient = played.variables[role]->gradient;
    if (gradient) gradients.push_back(to_array(*gradient));
  }
  return gradients;
});

struct Floats {
  SharedVariable<float> q, k, v;
  Index bytes() const {  // what backward() needs: q, k, v, the output, and a number for each query
    const Index rows = q->value.count() / q->value.size(3);
    return static_cast<Index>(sizeof(float)) *
           (q->value.count() + k->value.count() + v->value.count() + rows * v->value.size(3) + rows);
  }
};

Floats floats(Index length, bool needs_gradient = true) {
  const Shape<4> shape{1, 1, length, 8};
  return {variable<float>(shape, 51, needs_gradient), variable<float>(shape, 52, needs_gradient),
          variable<float>(shape, 53, needs_gradient)};
}

}  // namespace

TEST_SUITE("phase3.06_autograd") {
  TEST_CASE("one query and two keys worked with a pencil in the README") {
    ask("Follow the README's example line by line. Which is the first of its numbers that yours differs from?");
    const auto leaf = [](std::initializer_list<double> numbers) {
      Tensor<double, 4> value({1, 1, static_cast<Index>(numbers.size()), 1});
      std::copy(numbers.begin(), numbers.end(), value.data());
      return std::make_shared<Variable<double>>(Variable<double>{std::move(value)});
    };
    const auto q = leaf({1});
    const auto k = leaf({0, std::log(3.0)});
    const auto v = leaf({8, 4});
    AttentionFunction<double> attention({.scale = 1.0});
    const Tensor<double, 4> output = attention.forward(q, k, v);
    expect_about("output", output(0, 0, 0, 0), 5.0, 1e-12, "a quarter of 8 and three quarters of 4");
    Tensor<double, 4> d_output({1, 1, 1, 1});
    d_output(0, 0, 0, 0) = 1.0;
    attention.backward(d_output);
    expect_gradient("gradient of v", v->gradient, Array{{1, 1, 2, 1}, {0.25, 0.75}});
    expect_gradient("gradient of k", k->gradient, Array{{1, 1, 2, 1}, {0.75, -0.75}});
    expect_gradient("gradient of q", q->gradient, Array{{1, 1, 1, 1}, {-0.75 * std::log(3.0)}});
  }

  TEST_CASE("forward returns the attention of its three inputs") {
    ask("forward() has one result for its caller. Which engine computes it, and with which options?");
    int number = 0;
    for (const Story& story : stories()) {
      run_case(++number, story.why, [&] {
        const auto leaves = variables_of(story, 1);
        const auto want = engine::forward(leaves[0]->value, leaves[1]->value, leaves[2]->value, story.options);
        const Array output = to_array(want.output);
        expect_close("output", to_array(play(story).output), output, double_bound(output), ELEMENT);
      });
    }
  }

  TEST_CASE("every gradient agrees with difference quotients in float64") {
    ask("Move one number of q by 1e-6: by how much does sum(dO * output) move, and what does your gradient say?");
    int number = 0;
    for (const Story& story : stories()) {
      ++number;
      const bool plain = story.between == Between::nothing && story.times == 1 && !story.had_gradient;
      if (!plain || story.roles != std::array{0, 1, 2} || story.needs != std::array{true, true, true}) continue;
      run_case(number, story.why, [&] {
        const Played played = play(story);
        const auto moved = variables_of(story, 1);
        const OutputGradient d_output = output_gradient(story, 7);
        const auto loss = [&] {
          AttentionFunction<double> attention(story.options);
          const Array output = to_array(attention.forward(moved[0], moved[1], moved[2]));
          const Array weights = to_array(d_output.view);
          double sum = 0.0;
          for (std::size_t at = 0; at < output.count(); ++at) sum += output.values[at] * weights.values[at];
          return sum;
        };
        for (std::size_t role = 0; role < 3; ++role) {
          Tensor<double, 4>& value = moved[role]->value;
          Array want{{value.shape().begin(), value.shape().end()}, {}};
          for (Index at = 0; at < value.count(); ++at) {
            const double before = value.data()[at];
            value.data()[at] = before + 1e-6;
            const double up = loss();
            value.data()[at] = before - 1e-6;
            const double down = loss();
            value.data()[at] = before;
            want.values.push_back((up - down) / 2e-6);
          }
          const auto& got = played.variables[role]->gradient;
          const std::string name = std::string("gradient of ") + NAMES[role];
          if (!expect(got.has_value(), name, "has no gradient, but needs one")) return;
          const Bound bound{1e-6, double_bound(want).magnitude};
          if (!expect_close(name, to_array(*got), want, bound, ELEMENT)) return;
        }
      });
    }
  }

  TEST_CASE("options and the layout of dO reach the way back") {
    ask("forward() was told of a mask and a scale. Who tells backward()? And how far apart are the rows of dO?");
    for_each([](const Story& s) {
      return s.between == Between::nothing && s.times == 1 && !s.had_gradient && s.roles == std::array{0, 1, 2} &&
             s.needs == std::array{true, true, true};
    });
  }

  TEST_CASE("backward reads the inputs and the output of its forward whatever their owners did since") {
    ask("The caller wrote into q, or into the output that you returned, after forward(). Whose numbers do you read?");
    for_each([](const Story& s) {
      return s.between == Between::inputs_overwritten || s.between == Between::output_overwritten;
    });
  }

  TEST_CASE("a second forward forgets the first") {
    ask("Two forward() calls, one backward(). Which of the two is it the way back of, and who must not hear of it?");
    for_each([](const Story& s) { return s.between == Between::another_forward_before; });
    const auto first = variables_of(stories()[0], 1);
    const auto second = variables_of(stories()[0], 20);
    AttentionFunction<double> attention;
    attention.forward(first[0], first[1], first[2]);
    attention.forward(second[0], second[1], second[2]);
    attention.backward(output_gradient(stories()[0], 7).view);
    for (std::size_t role = 0; role < 3; ++role) {
      const std::string name = std::string(NAMES[role]) + " of the first";
      expect(!first[role]->gradient.has_value(), name, "has a gradient, but the second forward() was the last");
      expect(second[role]->gradient.has_value(), std::string(NAMES[role]) + " of the second", "has no gradient");
    }
  }

  TEST_CASE("a forward of frozen inputs forgets the one before as well") {
    ask("The last forward() saved nothing. What should a backward() after it be told?");
    const auto first = variables_of(stories()[0], 1);
    const auto frozen = variables_of({.why = "", .needs = {false, false, false}}, 20);
    AttentionFunction<double> attention;
    attention.forward(first[0], first[1], first[2]);
    attention.forward(frozen[0], frozen[1], frozen[2]);
    expect(!attention.can_go_back(), "can_go_back", "got true, but no input of the last forward() needs a gradient");
    expect_rejected("backward after a forward of frozen inputs", "d_output",
                    [&] { attention.backward(output_gradient(stories()[0], 7).view); });
    expect(!first[0]->gradient.has_value(), "q of the first", "has a gradient all the same");
  }

  TEST_CASE("gradients add up") {
    ask("A variable has a gradient already, from a pass before this one. What should become of it?");
    for_each([](const Story& s) { return s.times > 1 || s.had_gradient; });
  }

  TEST_CASE("only who needs a gradient gets one") {
    ask("Who asked for dK here? What should the others' gradient be afterwards?");
    for_each([](const Story& s) { return s.needs != std::array{true, true, true}; });
  }

  TEST_CASE("a variable in several roles gets the sum of its gradients") {
    ask("x is q and k at once. By which two ways does the loss feel a change of x?");
    for_each([](const Story& s) { return s.roles != std::array{0, 1, 2}; });
  }

  TEST_CASE("two functions that share a variable both add to it") {
    ask("x went into two layers. Through how many of them does the loss see it?");
    const Story& story = stories()[0];
    const auto leaves = variables_of(story, 1);
    const OutputGradient d_output = output_gradient(story, 7);
    AttentionFunction<double> one(story.options);
    AttentionFunction<double> two(story.options);
    one.forward(leaves[0], leaves[1], leaves[2]);
    two.forward(leaves[0], leaves[1], leaves[2]);
    two.backward(d_output.view);
    one.backward(d_output.view);
    Story twice = story;
    twice.times = 2;
    for (std::size_t role = 0; role < 3; ++role) {
      expect_gradient(std::string("gradient of ") + NAMES[role], leaves[role]->gradient, wanted_gradient(twice, role));
    }
  }

  TEST_CASE("two functions remember apart") {
    ask("Two layers go forward, then both go back. Whose inputs and output does the first one find?");
    const Story& story = stories()[0];
    const auto leaves = variables_of(story, 1);
    const auto others = variables_of(story, 20);
    AttentionFunction<double> one(story.options);
    AttentionFunction<double> two(story.options);
    one.forward(leaves[0], leaves[1], leaves[2]);
    two.forward(others[0], others[1], others[2]);
    one.backward(output_gradient(story, 7).view);
    for (std::size_t role = 0; role < 3; ++role) {
      expect_gradient(std::string("gradient of ") + NAMES[role], leaves[role]->gradient, wanted_gradient(story, role));
      expect(!others[role]->gradient.has_value(), std::string(NAMES[role]) + " of the other",
             "has a gradient, but its function has not gone back");
    }
  }

  TEST_CASE("a function that moved goes back all the same") {
    ask("Layers live in vectors, and vectors move what they hold. Does what you saved move along?");
    const Story& story = stories()[0];
    const auto leaves = variables_of(story, 1);
    std::vector<AttentionFunction<double>> layers;
    layers.emplace_back(story.options);
    layers[0].forward(leaves[0], leaves[1], leaves[2]);
    for (int more = 0; more < 5; ++more) layers.emplace_back();
    layers[0].backward(output_gradient(story, 7).view);
    expect_gradient("gradient of v", leaves[2]->gradient, wanted_gradient(story, 2));
  }

  TEST_CASE("what is saved keeps its variables alive") {
    ask("The caller let go of its variables between forward() and backward(). Who still holds them?");
    const Story& story = stories()[0];
    auto leaves = variables_of(story, 1);
    const std::weak_ptr<Variable<double>> q = leaves[0];
    {
      AttentionFunction<double> attention(story.options);
      attention.forward(leaves[0], leaves[1], leaves[2]);
      const SharedVariable<double> v = leaves[2];
      leaves = {};
      attention.backward(output_gradient(story, 7).view);
      expect_gradient("gradient of v", v->gradient, wanted_gradient(story, 2));
    }
    expect(q.expired(), "q", "is still alive after the function has gone: somebody keeps it for ever");
  }

  TEST_CASE("one call of the engine each way") {
    ask("How often must attention be computed for one forward(), and for one backward()?");
    const auto leaves = variables_of(stories()[0], 1);
    const OutputGradient d_output = output_gradient(stories()[0], 7);
    AttentionFunction<double> attention;
    const auto count = [](const char* name, const auto& call, int forward, int backward) {
      engine::calls() = {};
      call();
      const engine::Calls got = engine::calls();
      expect(got.forward == forward && got.backward == backward, name,
             "called engine::forward() " + std::to_string(got.forward) + " and engine::backward() " +
                 std::to_string(got.backward) + " times, want " + std::to_string(forward) + " and " +
                 std::to_string(backward));
    };
    count(
        "forward()", [&] { attention.forward(leaves[0], leaves[1], leaves[2]); }, 1, 0);
    count(
        "backward()", [&] { attention.backward(d_output.view); }, 0, 1);
    const CopyTask task = copy_task(3, 4, 3, 11);
    CopyLayer layer = copy_layer(task, 3, 0.5f);
    count(
        "train_step()", [&] { train_step(task, layer, 0.1f); }, 1, 1);
    count(
        "predict()", [&] { predict(task, layer); }, 1, 0);
  }

  TEST_CASE("what is saved grows with the length and not with its square") {
    ask("Of what backward() needs, what is as large as the matrix of scores, and must it wait in memory?");
    for (const Index length : {64, 256, 1024}) {
      const Floats leaves = floats(length);
      AttentionFunction<float> attention({.causal = true});
      const Allocations forward = allocations_of([&] { attention.forward(leaves.q, leaves.k, leaves.v); });
      const Tensor<float, 4> d_output = normal(leaves.q->value.shape(), 54);
      const Index budget = 2 * leaves.bytes() + 4096;
      const bool fine =
          expect(forward.kept <= budget, "saved",
                 std::to_string(forward.kept) + " bytes for " + std::to_string(length) +
                     " tokens; q, k, v, the output and a number for each query are " + std::to_string(leaves.bytes()));
      attention.backward(d_output);
      if (!fine) return;
    }
  }

  TEST_CASE("frozen inputs leave nothing behind") {
    ask("Nobody needs a gradient: it is a forward pass of a finished model. What is there to remember?");
    const Floats leaves = floats(256, false);
    AttentionFunction<float> attention;
    const Allocations forward = allocations_of([&] { attention.forward(leaves.q, leaves.k, leaves.v); });
    expect(!attention.can_go_back(), "can_go_back", "got true, but none of the inputs needs a gradient");
    expect(forward.kept <= 2048, "saved", std::to_string(forward.kept) + " bytes, want none");
  }

  TEST_CASE("nothing stays behind when the function has gone") {
    ask("Who deletes what forward() saved?");
    const Floats leaves = floats(256);
    const Tensor<float, 4> d_output = normal(leaves.q->value.shape(), 54);
    const Allocations all = allocations_of([&] {
      AttentionFunction<float> attention;
      for (int time = 0; time < 3; ++time) attention.forward(leaves.q, leaves.k, leaves.v);
      attention.backward(d_output);
      leaves.q->gradient.reset();
      leaves.k->gradient.reset();
      leaves.v->gradient.reset();
    });
    expect(all.kept <= 4096, "held", std::to_string(all.kept) + " bytes after everything was given up, want none");
  }

  TEST_CASE("float and double tell the same") {
    ask("The same object over the tiled steps that you wrote: does anything in it depend on the kind of number?");
    for (const bool causal : {false, true}) {
      const AttentionOptions options{.causal = causal, .scale = 0.4};
      const Shape<4> queries{1, 2, 33, 8};
      const Shape<4> keys{1, 2, 47, 8};
      const SharedVariable<float> of_float[] = {variable<float>(queries, 61), variable<float>(keys, 62),
                                                variable<float>(keys, 63)};
      const SharedVariable<double> of_double[] = {variable<double>(queries, 61), variable<double>(keys, 62),
                                                  variable<double>(keys, 63)};
      AttentionFunction<float> narrow(options);
      AttentionFunction<double> wide(options);
      narrow.forward(of_float[0], of_float[1], of_float[2]);
      for (const auto& each : of_float) std::fill_n(each->value.data(), each->value.count(), 0.0f);
      wide.forward(of_double[0], of_double[1], of_double[2]);
      narrow.backward(variable<float>(queries, 64)->value);
      wide.backward(variable<double>(queries, 64)->value);
      for (std::size_t role = 0; role < 3; ++role) {
        const std::string name = std::string("gradient of ") + NAMES[role];
        if (!expect(of_float[role]->gradient.has_value(), name, "has no gradient, but needs one")) return;
        const Array want = to_array(*of_double[role]->gradient);
        const Bound bound{1e-5, double_bound(want).magnitude};
        if (!expect_close(name, to_array(*of_float[role]->gradient), want, bound, ELEMENT)) return;
      }
    }
  }

  TEST_CASE("a layer that knows nothing loses what the README says") {
    ask("With weights of 0 all places that may be seen weigh alike. How probable is the right symbol at place i?");
    const CopyTask task{2, 3, 3, {0, 1, 0, /* and */ 2, 0, 1}};
    CopyLayer layer{Matrix::Zero(6, 2), Matrix::Zero(6, 2)};
    // Place 1 sees two symbols, the right one once; place 2 sees three, the right one once.
    expect_about("loss", train_step(task, layer, 1.0f), (std::log(2.0) + std::log(3.0)) / 2, 1e-6,
                 "the mean of log 2 and log 3");
    const CopyTask alike{1, 4, 2, {1, 1, 1, 1}};
    CopyLayer other{Matrix::Zero(6, 2), Matrix::Zero(6, 2)};
    expect_about("loss", train_step(alike, other, 1.0f), 0.0, 1e-6, "every place holds the right symbol");
  }

  TEST_CASE("a step goes down the gradient of the loss") {
    ask("From the loss to the weights there are four stations. At which does your gradient leave the right one?");
    for (const unsigned seed : {11u, 12u, 13u}) {
      const CopyTask task = copy_task(seed - 9, 6, 3, seed);
      const CopyLayer before = copy_layer(task, 4, 0.7f);
      CopyLayer after = before;
      const double loss = loss_of(task, before.query_weights.cast<double>(), before.key_weights.cast<double>());
      if (!expect_about("loss", train_step(task, after, 0.5f), loss, 1e-5, "the loss before the step")) return;
      if (!expect_step(task, before, after, 0.5f)) return;
    }
  }

  TEST_CASE("a second step knows nothing of the first") {
    ask("Gradients add up where they are. Which of yours are still there when the second step begins?");
    const CopyTask task = copy_task(2, 5, 3, 14);
    CopyLayer layer = copy_layer(task, 3, 0.6f);
    for (int step = 0; step < 3; ++step) {
      const CopyLayer before = layer;
      train_step(task, layer, 0.8f);
      if (!expect_step(task, before, layer, 0.8f)) return;
    }
    const CopyTask other = copy_task(3, 4, 2, 15);  // another task, another layer
    CopyLayer another = copy_layer(other, 5, 0.6f);
    const CopyLayer before = another;
    train_step(other, another, 0.8f);
    expect_step(other, before, another, 0.8f);
  }

  TEST_CASE("a learning rate of 0 leaves the layer as it is") {
    ask("How far does a step of length 0 go?");
    const CopyTask task = copy_task(2, 5, 3, 16);
    const CopyLayer before = copy_layer(task, 3, 0.6f);
    CopyLayer layer = before;
    const float first = train_step(task, layer, 0.0f);
    const float second = train_step(task, layer, 0.0f);
    expect_same_bits("query_weights", to_array(layer.query_weights), to_array(before.query_weights), WEIGHT,
                     "in a step of length 0");
    expect_same_bits("key_weights", to_array(layer.key_weights), to_array(before.key_weights), WEIGHT,
                     "in a step of length 0");
    const double want = loss_of(task, before.query_weights.cast<double>(), before.key_weights.cast<double>());
    expect_about("loss", first, want, 1e-5, "the layer's");
    expect_about("loss", second, want, 1e-5, "the same once more");
  }

  TEST_CASE("predictions are probabilities that know nothing of what comes later") {
    ask("May place 3 look at place 5? What do its probabilities add up to?");
    CopyTask task = copy_task(3, 7, 4, 17);
    const CopyLayer layer = copy_layer(task, 5, 1.0f);
    const Tensor<float, 3> got = predict(task, layer);
    for (Index b = 0; b < task.sequences; ++b) {
      const MatrixXd want =
          probabilities_of(task, b, layer.query_weights.cast<double>(), layer.key_weights.cast<double>());
      const Bound bound{1e-5,
                        {{task.length, task.symbols}, std::vector<double>(static_cast<std::size_t>(want.size()), 1.0)}};
      if (!expect_close("probability", to_array(got.view()[b]), to_array(want), bound, {"place", "symbol"})) return;
    }
    for (Index b = 0; b < task.sequences; ++b) {
      int& last = task.tokens[static_cast<std::size_t>((b + 1) * task.length - 1)];
      last = (last + 1) % static_cast<int>(task.symbols);
    }
    const Tensor<float, 3> other = predict(task, layer);
    for (Index b = 0; b < task.sequences; ++b) {
      Array before = to_array(got.view()[b]);
      Array after = to_array(other.view()[b]);
      const auto earlier = static_cast<std::size_t>((task.length - 1) * task.symbols);
      for (Array* each : {&before, &after}) {
        each->shape = {task.length - 1, task.symbols};
        each->values.resize(earlier);
      }
      if (!expect_same_bits("probability", after, before, {"place", "symbol"}, "when a later symbol changed")) return;
    }
  }

  TEST_CASE("training finds out how to look one place back") {
    ask("The loss does not go down, or not to the end. Print it every 10 steps: does it fall, jump, or stand?");
    const CopyTask task = copy_task(8, 12, 6, 18);
    CopyLayer layer = copy_layer(task, 16, 0.1f);
    const float first = train_step(task, layer, 10.0f);
    float last = first;
    for (int step = 1; step < 120; ++step) last = train_step(task, layer, 10.0f);
    expect(last < 0.1f * first, "loss",
           "from " + std::to_string(first) + " to " + std::to_string(last) +
               " in 120 steps, want less than a tenth of the first");
    const CopyTask unseen = copy_task(8, 12, 6, 19);
    const double share = share_right(unseen, predict(unseen, layer));
    expect(share > 0.97, "right",
           std::to_string(share) + " of the places of sequences never seen, want more than 0.97");
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Story& story = stories()[0];
    const auto leaves = variables_of(story, 1);
    const OutputGradient d_output = output_gradient(story, 7);
    AttentionFunction<double> attention(story.options);
    expect_rejected("backward before any forward", "d_output", [&] { attention.backward(d_output.view); });
    attention.forward(leaves[0], leaves[1], leaves[2]);  // this is right

    const auto wrong = variable<double>({2, 2, 4, 6}, 70);
    expect_rejected("k of another width", "k: ", [&] { attention.forward(leaves[0], wrong, leaves[2]); });
    const auto longer = variable<double>({2, 2, 5, 2}, 70);
    expect_rejected("v longer than k", "v: ", [&] { attention.forward(leaves[0], leaves[1], longer); });
    for (const Shape<4>& shape : {Shape<4>{2, 2, 4, 2}, Shape<4>{2, 3, 2, 2}, Shape<4>{1, 4, 3, 2},
                                  Shape<4>{2, 2, 3, 3}, Shape<4>{2, 1, 3, 2}, Shape<4>{1, 2, 3, 2}}) {
      const Tensor<double, 4> bad = std::move(variable<double>(shape, 71)->value);
      expect_rejected("d_output of shape " + to_text(shape), "d_output", [&] { attention.backward(bad); });
    }
    for (const auto& leaf : leaves)
      expect(!leaf->gradient.has_value(), "gradient", "changed by a call that was refused");
    attention.backward(d_output.view);
    for (std::size_t role = 0; role < 3; ++role) {
      expect_gradient(std::string("gradient of ") + NAMES[role] + " after calls that were refused",
                      leaves[role]->gradient, wanted_gradient(story, role));
    }

    const CopyTask task = copy_task(2, 3, 2, 20);
    CopyLayer layer = copy_layer(task, 3, 0.5f);
    train_step(task, layer, 0.1f);  // this is right
    CopyLayer bad = layer;
    bad.query_weights = Matrix::Zero(4, 3);
    expect_rejected("query_weights of 4 rows", "query_weights", [&] { train_step(task, bad, 0.1f); });
    expect_rejected("query_weights of 4 rows", "query_weights", [&] { predict(task, bad); });
    bad = layer;
    bad.key_weights = Matrix::Zero(5, 2);
    expect_rejected("key_weights of another width", "key_weights", [&] { train_step(task, bad, 0.1f); });
  }
}
