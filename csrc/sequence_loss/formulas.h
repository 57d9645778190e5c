// The loss of one sequence and its derivative in logps, in closed form and fp64: the mathematics of
// prefopt_kernels/losses, which stays the definition and is what the tests compare this with.
//
// Nothing here subtracts two numbers that are both near 1: sigmoids, their logarithms and 1 - p come in the forms that
// keep their last digits, so that every result is finite for every finite input.
#pragma once
#include <math.h>
#include <stdint.h>

#include <algorithm>

namespace prefopt {

enum Method { kKto = 0, kApoZero = 1, kBco = 2, kEnhancedKto = 3 };  // METHODS of parameters.py
enum Weighting { kNone = 0, kTverskyKahneman = 1, kPrelec = 2 };     // 1 + index in WEIGHTINGS

constexpr double kGamma = 0.61;           // Tversky and Kahneman 1992, gains
constexpr double kPrelecExponent = 0.65;  // Prelec 1998
constexpr double kFar = 15;               // logits above: log(softplus(-a)) by its series
constexpr double kNearest = -1e-4;        // nats per token; above, log-odds go on along their tangent

// In the order of Parameters in parameters.py; a bound that is not set is infinite, a decision_mean of 0 asks for the
// rows' own.
struct Numbers {
  double reference_point, shift, shift_gate, odds_baseline, decision_mean, beta, shift_bound, loss_aversion, alpha,
      kappa, decision_low, decision_high, odds_weight, desirable_weight, undesirable_weight, main_bound, odds_bound;
};
constexpr int64_t kNumbers = sizeof(Numbers) / sizeof(double);

struct Form {
  Method method;
  Weighting win, decision;
  Numbers n;
};

struct Row {
  double loss, slope;  // slope = d loss / d logps
};

inline double sigmoid(double x) {
  const double t = exp(-fabs(x));
  return (x >= 0 ? 1 : t) / (1 + t);
}

inline double softplus(double x) { return fmax(x, 0) + log1p(exp(-fabs(x))); }

inline double log_add_exp(double x, double y) { return fmax(x, y) + log1p(exp(-fabs(x - y))); }

// log(-log sigmoid(a)), also where sigmoid(a) rounds to 1
inline double log_surprise(double a) { return a < kFar ? log(softplus(-a)) : -a - exp(-a) / 2; }

// 1 - W(sigmoid(a)), and the derivative of W(sigmoid(a)) in a
inline Row missed(double a, Weighting weighting) {
  if (weighting == kNone) return {sigmoid(-a), sigmoid(a) * sigmoid(-a)};
  if (weighting == kTverskyKahneman) {
    const double p = -kGamma * softplus(-a), q = -kGamma * softplus(a);
    const double log_win = p - log_add_exp(p, q) / kGamma;
    return {-expm1(log_win), exp(log_win) * (sigmoid(-kGamma * a) - (1 - kGamma) * sigmoid(-a))};
  }
  const double log_win = -exp(kPrelecExponent * log_surprise(a));
  const double rest = (kPrelecExponent - 1) * log_surprise(a) - softplus(a);
  return {-expm1(log_win), kPrelecExponent * exp(log_win + rest)};
}

// W(c) / c for c = exp(mean of logp), clipped
inline double decision_weight(double mean_logps, const Form& form) {
  const double m = mean_logps > 0 ? 0 : mean_logps;
  const double log_weight = form.decision == kTverskyKahneman
                                ? kGamma * m - log_add_exp(kGamma * m, kGamma * log(-expm1(m))) / kGamma
                                : -pow(-m, kPrelecExponent);
  const double weight = exp(log_weight - m);
  return weight < form.n.decision_low ? form.n.decision_low : std::min(weight, form.n.decision_high);
}

// z0, moved towards the bounded shift as far as the gate is open; a closed gate keeps out a shift that is NaN, too
inline double moved_reference_point(const Numbers& n) {
  if (!(n.shift_gate > 0)) return n.reference_point;
  const double shift = n.shift < -n.shift_bound ? -n.shift_bound : n.shift > n.shift_bound ? n.shift_bound : n.shift;
  return (1 - n.shift_gate) * n.reference_point + n.shift_gate * (shift / n.beta);
}

inline Row bco(double log_ratio, double sign, const Numbers& n) {
  const double u = sign * (n.beta * log_ratio - n.shift);
  return {softplus(-u), -sign * n.beta * sigmoid(-u)};
}

// KTO is Enhanced KTO with everything off. `weight` is the class's times the decision weight, `z` the reference point.
inline Row enhanced_kto(double log_ratio, double mean_logps, double length, double sign, double weight, double z,
                        const Form& form) {
  const Numbers& n = form.n;
  const double u = sign * (n.beta * (log_ratio - z));
  double a = u, slope = 1;
  if (n.alpha != 1) {
    const double distance = log1p(fabs(u) / n.kappa);
    a = copysign(n.kappa / n.alpha * expm1(n.alpha * distance), u);
    slope = exp((n.alpha - 1) * distance);
  }
  Row main = missed(a, form.win);
  slope *= main.slope;
  if (!(u >= 0) && n.loss_aversion != 1) {
    const double even = missed(0, form.win).loss;
    main.loss = even + n.loss_aversion * (main.loss - even);
    slope *= n.loss_aversion;
  }
  slope *= weight * n.beta;
  Row row = {weight * main.loss, -sign * (slope > n.main_bound ? n.main_bound : slope)};
  if (n.odds_weight > 0) {
    const double m = mean_logps > kNearest ? kNearest : mean_logps;
    const double rest = -expm1(m), tangent = -1 / expm1(kNearest);
    const double ahead = sign * (m - log(rest) + tangent * (mean_logps - m) - n.odds_baseline);
    const double odds = n.odds_weight * sigmoid(-ahead) / rest;
    row.loss += n.odds_weight * softplus(-ahead);
    row.slope -= sign * (odds > n.odds_bound ? n.odds_bound : odds) / length;
  }
  return row;
}

}  // namespace prefopt
